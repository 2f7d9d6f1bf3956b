"""One condition's plan: from settings and hardware to phases, seconds and memory.

Every rank does the same: its share of the step's questions, rounded up. What the plan says of a
measured machine (`--hardware cpu`) and of one from the table is the same but for the source of the
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastsd.conditions import CONDITIONS, conditions_of
from fastsd.config import Config
from fastsd.config.sections import LoraConfig, ModelConfig
from fastsd.planning.counts import Work, count_step, generation, streams
from fastsd.planning.fleet import Served, serve
from fastsd.planning.hardware import ASSUMED, Fleet, InPhases, PlanError, Seconds
from fastsd.planning.memory import Memory, largest_micro_batch, memory, most_rows
from fastsd.planning.model import ModelCounts, count_model
from fastsd.planning.ranks import Site, make_site, over_ranks
from fastsd.planning.rows import Lengths, Step
from fastsd.runtime import hardware

_GIB = 2**30


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the configuration. Lengths: means, None for the limit."""

    fleet: Fleet | None  # None: this machine
    rollouts: Fleet | None
    critics: Fleet | None
    question: int | None = None
    feedback: int | None = None
    response: int | None = None
    critique: int | None = None


@dataclass(frozen=True)
class Plan(InPhases):
    """Everything that is printed. full: the same without shared prefixes. capacity: usable bytes of
    a device. notes: what was taken for granted."""

    condition: str
    hardware: str
    model: ModelCounts
    step: Step
    site: Site
    works: tuple[Work, ...]
    seconds: tuple[Seconds, ...]
    full: tuple[Work, ...]
    memory: Memory
    full_memory: Memory
    capacity: float
    micro_batch: int | None
    rows: int | None
    served: tuple[Served, ...]
    notes: tuple[str, ...]
    changes: tuple[str, ...]

    @property
    def missing(self) -> float:
        """Bytes by which a device is too small; zero where the step fits."""
        return max(0.0, self.memory.peak - self.capacity)


def refuse_contradictions(config: Config, asked: Asked) -> None:
    """config: of all conditions. Raises PlanError for what was asked about but does not happen."""
    kind, engine = config.critic.kind, config.rollout.engine
    names = conditions_of(config.condition)
    contexts = any(CONDITIONS[name].context for name in names)
    critics = any(CONDITIONS[name].critic for name in names)
    writes = critics and kind in ("local", "server")
    without = (
        f"condition = {config.condition!r} has no critic; choose one that has"
        if not critics
        else ""
    )
    problems = (
        (asked.rollouts, engine != "vllm", "rollout-hardware",
         f'rollout.engine = "{engine}" has no servers; set it to "vllm"'),
        (asked.critics, not (critics and kind == "server"), "critic-hardware",
         without or f'critic.kind = "{kind}" has no servers; set it to "server"'),
        (asked.critique, not writes, "critique",
         without or f'critic.kind = "{kind}" asks no model; set it to "local" or "server"'),
        (asked.feedback, not contexts, "feedback",
         f"condition = {config.condition!r} shows none; choose another"),
    )  # fmt: skip
    for given, contradicted, flag, reason in problems:
        if given is not None and contradicted:
            raise PlanError(f"--{flag}: {reason}, or leave --{flag} out")


def make_plan(config: Config, asked: Asked) -> Plan:
    """config: of one condition. Raises PlanError or ModelError for what cannot be planned."""
    dtype = _dtype(config, asked)
    model = count_model(config.model, dtype)
    notes: list[str] = []
    lengths = _lengths(config, asked, model, notes)
    ranks = asked.fleet.count if asked.fleet else 1
    step = _step(config, lengths, ranks)
    kind = "gpu" if asked.fleet else "cpu"
    site = make_site(config, model, kind, ranks, step.teacher != "none")
    full = replace(step, shared=False)
    works, plain = (_works(model, each, site) for each in (step, full))
    works += _local_critic(config, asked, step, notes)
    timed = _timer(asked.fleet, model, step, works, dtype)
    capacity = asked.fleet.capacity if asked.fleet else _this_machine()
    found = memory(model, step, site)
    return Plan(
        condition=config.condition,
        hardware=f"{ranks}x{asked.fleet.device.name}" if asked.fleet else "cpu, measured here",
        model=model,
        step=step,
        site=site,
        works=tuple(works),
        seconds=tuple(timed(work) for work in works),
        full=tuple(plain),
        memory=found,
        full_memory=memory(model, full, site),
        capacity=capacity,
        micro_batch=largest_micro_batch(model, step, site, capacity),
        rows=most_rows(model, step, site, capacity) if site.inprocess else None,
        served=tuple(_served(config, asked, model, lengths, notes)),
        notes=tuple(notes),
        changes=tuple(_changes(config, model, step, site, capacity, dtype))
        if found.peak > capacity
        else (),
    )


def _dtype(config: Config, asked: Asked) -> torch.dtype:
    if asked.fleet is None:
        return hardware.resolve_dtype(config.model.dtype, "cpu")
    return torch.float32 if config.model.dtype == "float32" else torch.bfloat16


def _lengths(config: Config, asked: Asked, model: ModelCounts, notes: list[str]) -> Lengths:
    """Those that were given; limits of the configuration, within the model's, for the others."""
    rollout, prompt = config.rollout, config.prompt
    response = asked.response or rollout.max_new_tokens
    if response > rollout.max_new_tokens:
        raise PlanError(
            f"--response {response}: rollout.max_new_tokens = {rollout.max_new_tokens} cuts "
            "responses there; raise it, or plan for shorter ones"
        )
    room = (model.longest or 2**62) - response
    question = asked.question or max(1, min(prompt.max_prompt_tokens, room))
    room -= question
    if room < 0:
        raise PlanError(
            f"question {question} + response {response} tokens: {model.name} has "
            f"{model.longest} positions; give a shorter --question or --response"
        )
    feedback = asked.feedback or min(prompt.max_feedback_tokens, room)
    if CONDITIONS[config.condition].context and feedback > room:
        raise PlanError(
            f"--feedback {feedback}: beside question {question} and response {response} "
            f"{model.name} has {room} positions left; give a shorter one"
        )
    for name, given in (("question", asked.question), ("feedback", asked.feedback)):
        if given is None:
            notes.append(f"{name}s are as long as they may be; give --{name} for their mean")
    if asked.response is None:
        notes.append("responses are as long as they may be; give --response for their mean")
    return Lengths(question, feedback, response, rollout.samples_per_prompt, rollout.max_new_tokens)


def _step(config: Config, lengths: Lengths, ranks: int) -> Step:
    prompts = config.rollout.prompts_per_step
    if ranks > prompts:
        raise PlanError(
            f"{ranks} ranks, but rollout.prompts_per_step = {prompts}: every rank needs a "
            "question; raise it, or plan for fewer devices"
        )
    condition, loss = CONDITIONS[config.condition], config.loss
    divergence, _ = condition.weights(loss.divergence_weight, loss.policy_weight)
    taught = condition.template is not None and divergence != 0
    return Step(
        lengths=lengths,
        questions=math.ceil(prompts / ranks),
        teacher=("group" if config.condition == "reference" else "own") if taught else "none",
        live=config.teacher.kind == "live",
        budget=config.optim.micro_batch_tokens,
        defers=ranks == 1,
        batch_rows=config.rollout.batch_rows,
    )


def _works(model: ModelCounts, step: Step, site: Site) -> list[Work]:
    found = over_ranks(model, count_step(model, step), site, streams(step))
    return [
        work
        for work in found
        if (site.inprocess or not work.phase.startswith("rollout"))
        and (site.teaches or not work.phase.startswith("teacher"))
    ]


def _timer(
    fleet: Fleet | None, model: ModelCounts, step: Step, works: list[Work], dtype: torch.dtype
) -> Callable[[Work], Seconds]:
    if fleet is not None:
        return fleet.seconds
    from fastsd.planning.measured import measure_cpu

    return measure_cpu(model, step, works, dtype).seconds


def _this_machine() -> float:
    total, _ = hardware.memory_bytes()
    if total is None:
        raise PlanError("--hardware cpu: this system does not say how much memory it has")
    return ASSUMED.usable * total


def _critic_step(config: Config, asked: Asked, questions: int, lengths: Lengths) -> Step:
    """Critiques as generation: the attempt is part of each prompt, so nothing is shared."""
    shown = lengths.question + lengths.response
    shown += lengths.feedback if config.critic.sees == "solution" else 0
    reply = asked.critique or config.critic.max_tokens
    count = questions * lengths.samples
    at = Lengths(shown, 0, reply, 1, config.critic.max_tokens)
    return Step(at, count, "none", False, 2**62, True, count)


def _local_critic(config: Config, asked: Asked, step: Step, notes: list[str]) -> list[Work]:
    """Phases of a critic in the trainer's process."""
    if not CONDITIONS[config.condition].critic or config.critic.kind != "local":
        return []
    judge = count_model(ModelConfig(name=config.critic.model), _dtype(config, asked))
    notes.append("the local critic's weights are not in the memory below")
    return generation(judge, _critic_step(config, asked, step.questions, step.lengths), "critic")


def _served(
    config: Config, asked: Asked, model: ModelCounts, lengths: Lengths, notes: list[str]
) -> list[Served]:
    prompts = config.rollout.prompts_per_step
    served = []
    if config.rollout.engine == "vllm" and asked.rollouts:
        step = replace(_step(config, lengths, 1), questions=prompts)
        bare = config.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
        merged = count_model(bare, torch.bfloat16) if config.model.lora else model
        served.append(serve(merged, step, asked.rollouts, "rollout", synced=True))
    elif config.rollout.engine == "vllm":
        notes.append("rollouts come from servers: give --rollout-hardware to plan those too")
    if CONDITIONS[config.condition].critic and config.critic.kind == "server":
        if asked.critics:
            judge = count_model(ModelConfig(name=config.critic.model), torch.bfloat16)
            step = _critic_step(config, asked, prompts, lengths)
            served.append(serve(judge, step, asked.critics, "critic", synced=False))
        else:
            notes.append("critiques come from a server: give --critic-hardware to plan it too")
    return served


def _changes(
    config: Config, model: ModelCounts, step: Step, site: Site, capacity: float, dtype: torch.dtype
) -> list[str]:
    """What would make a step fit that does not, the least first; smaller micro-batches with each
    where they are needed."""
    checked = config.model.model_copy(update={"gradient_checkpointing": True})
    adapters = checked.model_copy(update={"lora": config.model.lora or LoraConfig()})
    off = replace(site, teacher="adapter_off")
    checks = "--model.gradient-checkpointing true"
    lora = f"--model.lora.r 64 --teacher.kind adapter_off {checks}"
    models = [("", model, site)]
    if not config.model.gradient_checkpointing:
        models.append((checks, count_model(checked, dtype), site))
    if config.model.lora is None:
        models.append((lora, count_model(adapters, dtype), off))
    found = []
    for apart in (False, True) if site.inprocess and site.kind == "gpu" else (False,):
        for flags, other, place in models:
            place = replace(place, inprocess=site.inprocess and not apart)
            budget = largest_micro_batch(other, step, place, capacity)
            if budget is not None:
                smaller = f"--optim.micro-batch-tokens {budget}" if budget < step.budget else ""
                servers = "--rollout.engine vllm with servers of their own" if apart else ""
                found.append(" ".join(filter(None, (flags, smaller, servers))))
    more = [2**n for n in range(1, 11) if 2**n > site.ranks] if site.kind == "gpu" else []
    for ranks in more if not found else ():
        # In-process rollouts hold all weights on every rank, however many there are.
        place = replace(site, ranks=ranks, inprocess=False)
        if largest_micro_batch(model, step, place, capacity) is not None:
            found.append(f"{ranks} devices, as many prompts, --rollout.engine vllm")
            break
    return found[:3]
