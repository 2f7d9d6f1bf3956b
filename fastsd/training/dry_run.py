"""--dry-run: everything a run would do first, once, without training or writing anything.

Resolves the configuration, loads model and data, renders one student and one teacher prompt with
the part they share marked, runs the longest row forward and backward, estimates memory, and names
the implementation of each operation. Under torchrun every rank runs that row, and the figures are
those of a rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsd.conditions import conditions_of
from fastsd.config import dump_toml, for_condition
from fastsd.config.load import Invocation
from fastsd.critics.rule import RuleCritic
from fastsd.runtime.phases import peak_memory_mib
from fastsd.runtime.shards import local
from fastsd.training.collect import samples_of
from fastsd.training.recorder import implementations
from fastsd.training.session import Session
from fastsd.types import Feedback, Prompt, Rollout, Sample, common_prefix

PROMPTS_LOOKED_AT = 64
_MIB = 2**20
Update = Callable[[Session, Sequence[Sample]], Any]


def dry_run(invocation: Invocation, update: Update) -> None:
    """Prints the report; raises what a run would raise. update: one optimizer step on samples."""
    config = invocation.config
    print(f"# resolved configuration: {', '.join(invocation.sources)}")
    print(dump_toml(config))
    for name in conditions_of(config.condition):
        print(f"# condition {name}")
        _dry_run_condition(Session(for_condition(config, name), Path("dry-run")), update)
    print("dry run: nothing was trained or written")


def _dry_run_condition(session: Session, update: Update) -> None:
    for operation, what in implementations(session).items():
        print(f"{operation}: {what}")
    prompts = session.train_data.take(0, PROMPTS_LOOKED_AT, session.config.seed)
    longest = max(prompts, key=lambda prompt: len(session.renderer.student(prompt)))
    sample = _longest_sample(session, longest)
    _print_prompts(session, sample)
    before = peak_memory_mib(session.policy.device)
    start = time.perf_counter()
    update(session, _for_each_rank(session, sample))
    seconds = time.perf_counter() - start
    grown = peak_memory_mib(session.policy.device) - before
    measured = session.world.gather((seconds, grown, memory_estimate(session)))
    seconds, grown = (max(values) for values in zip(*((s, g) for s, g, _ in measured), strict=True))
    each = " on every rank" if session.world.size > 1 else ""
    response = len(sample.rollout.response_ids)
    print(
        f"longest row: prompt {len(sample.student_ids)}, with feedback "
        f"{len(sample.teacher_ids or ())}, response {response} tokens: one update{each} in "
        f"{seconds:.2f} s, peak memory +{grown:.0f} MiB"
    )
    for part in memory_estimate(session):
        print(f"memory, {part}: {_on_ranks([parts[part] for _, _, parts in measured])}")


def _for_each_rank(session: Session, sample: Sample) -> list[Sample]:
    """The sample once for every rank, as questions of their own, so that each computes it."""
    prompt = sample.rollout.prompt
    copies = [replace(prompt, id=f"{prompt.id}, {n}") for n in range(session.world.size)]
    return [replace(sample, rollout=replace(sample.rollout, prompt=copy)) for copy in copies]


def _on_ranks(mebibytes: Sequence[float]) -> str:
    least, most = f"{min(mebibytes):.1f}", f"{max(mebibytes):.1f}"
    each = f" on each of {len(mebibytes)} ranks" if len(mebibytes) > 1 else ""
    return f"{most if least == most else f'{least} to {most}'} MiB{each}"


def _longest_sample(session: Session, prompt: Prompt) -> Sample:
    """A sample with a response of max_new_tokens ordinary ids and a reward of one."""
    count = session.config.rollout.max_new_tokens
    tokenizer = session.policy.tokenizer
    word = session.renderer.encode_text("1") or [tokenizer.eos_token_id]
    ids = tuple((word * count)[:count])
    logprobs = (-1.0,) * count
    rollout = Rollout(prompt, 0, ids, logprobs, tokenizer.decode(ids), truncated=True, reward=1.0)
    [sample] = samples_of(session, [rollout], [_feedback(session, rollout)])
    return replace(sample, advantage=1.0)


def _feedback(session: Session, rollout: Rollout) -> Feedback:
    """What the teacher is shown for a response that nobody wrote. A model as critic is not asked,
    and a sibling does not exist: feedback as long as the response stands in, as a critique is."""
    maker = session.maker
    if maker.condition.context is None:
        return Feedback(None)
    if maker.critic is not None and not isinstance(maker.critic, RuleCritic):
        return Feedback(rollout.text)
    [feedback] = maker([rollout])
    return feedback if feedback.text is not None else Feedback(rollout.text)


def _print_prompts(session: Session, sample: Sample) -> None:
    tokenizer = session.policy.tokenizer
    if sample.teacher_ids is None:
        print(f"student prompt:\n{tokenizer.decode(sample.student_ids)}")
        return
    shared = len(common_prefix([sample.student_ids, sample.teacher_ids]))
    print(f"shared by student and teacher ({shared} tokens):")
    print(f"[[{tokenizer.decode(sample.student_ids[:shared])}]]")
    print(f"student goes on:\n{tokenizer.decode(sample.student_ids[shared:])}")
    print(f"teacher goes on:\n{tokenizer.decode(sample.teacher_ids[shared:])}")


def memory_estimate(session: Session) -> dict[str, float]:
    """MiB that stay allocated through training on this rank, counted from the parameters."""

    def mebibytes(tensors) -> float:
        return sum(local(t).nbytes for t in tensors) / _MIB

    trainable = list(session.optimizer.parameters.values())
    masters = list(session.optimizer.masters.values())
    copies = [m for p, m in zip(trainable, masters, strict=True) if m is not p]
    teacher = session.teacher.policy if session.teacher else session.policy
    copied = teacher is not session.policy
    estimate = {
        "weights": mebibytes(session.policy.model.parameters()),
        "fp32 masters": mebibytes(copies),
        "optimizer moments": 2 * mebibytes(masters),
        "gradients": mebibytes(trainable),
        "teacher copy": mebibytes(teacher.model.parameters()) if copied else 0.0,
        "loss head scratch, at most": 256.0 if session.policy.device.type == "cpu" else 1024.0,
    }
    if session.teacher and session.config.teacher.kind == "ema":
        estimate["teacher's average"] = mebibytes(session.teacher.state_tensors().values())
    if session.world.size > 1:
        numbers = sum(parameter.numel() for parameter in session.policy.model.parameters())
        gathered = numbers * session.policy.dtype.itemsize / _MIB
        estimate["all weights, while responses are sampled"] = gathered
    return estimate
