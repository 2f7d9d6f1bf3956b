"""One run's moving parts, put together from a configuration, saved and restored exactly.

A session stands between two optimizer steps: `step` updates are done, `cursor` prompts are taken,
`buffer` holds samples that were rolled out but not yet trained on. Together with the optimizer and
an averaged teacher that is the whole state; all randomness is a function of (seed, step, prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastsd.checkpoint import LoadedCheckpoint, load_latest, save_checkpoint
from fastsd.checkpoint.matches import (
    binding_settings,
    parameter_shapes,
    refuse_other_data,
    refuse_other_model,
    refuse_other_settings,
)
from fastsd.conditions import CONDITIONS
from fastsd.config import Config
from fastsd.errors import FastsdError
from fastsd.evaluation.results import scored_samples, tabulate
from fastsd.evaluation.solver import Solver
from fastsd.guards import Guard
from fastsd.model import Policy
from fastsd.model.micro_batches import MicroBatch, micro_batches, micro_batches_by_rank
from fastsd.optimizer import Optimizer
from fastsd.parallel.placement import place_weights, refuse_ranks
from fastsd.preflight import check_prompts
from fastsd.prompts.samples import make_samples
from fastsd.prompts.sources import required_fields
from fastsd.records.folder import append_evaluation, read_evaluations
from fastsd.rewards.functions import group_advantages, score_rollouts
from fastsd.runtime.agreement import refuse_other_inputs, refuse_other_start
from fastsd.runtime.phases import PhaseClock
from fastsd.runtime.signals import SignalGate
from fastsd.runtime.world import open_world
from fastsd.teachers.passes import Passes
from fastsd.teachers.self_teacher import Teacher
from fastsd.training.feedback import dropped_rollouts, feedback_maker
from fastsd.training.state import sample_from_json, sample_to_json
from fastsd.types import Feedback, Prompt, Rollout, Sample
from fastsd_kernels.loss_head import implementation_choice


class Session(Solver):
    """A solver that learns: everything one (condition, seed) run needs.

    Raises FastsdError where it cannot start.
    """

    def __init__(self, config: Config, run_dir: Path):
        self.run_dir = run_dir
        torch.manual_seed(config.seed)
        self.world = open_world(config.parallel.timeout_s, config.device)
        refuse_other_start(self.world, config.model_dump(mode="json"))
        refuse_ranks(config, self.world)
        super().__init__(config, run_dir, required_fields(config), self.world)
        self.loss_head = _loss_head(config.loss.impl, self.policy)
        asks = CONDITIONS[config.condition].critic
        self.maker = feedback_maker(config, self.critic if asks else None)
        self.teacher = Teacher(self.policy, config.teacher) if self.maker.template else None
        refuse_other_inputs(self)
        self.placement = place_weights(config, self.policy, self.teacher, self.world)
        if self.placement.shards_head:
            self.loss_head = "sharded by vocabulary"
        self.guard = Guard(config.guard)
        self.optimizer = Optimizer(self.policy.model, config.optim, self.guard.is_spike, self.world)
        self.clock = PhaseClock(self.policy.device)
        self.gate = SignalGate(self.world)
        self.step = 0
        self.cursor = 0
        self.buffer: list[Sample] = []
        check_prompts(self, config)

    def where(self) -> str:
        """The step and phase under way, for a message."""
        return f" in phase {self.clock.current!r} of update {self.step + 1}"

    # -- rollouts ---------------------------------------------------------------------------------

    def next_samples(self) -> list[Sample]:
        """Samples for one optimizer step: from the buffer, which a new batch of rollouts fills."""
        if not self.buffer:
            collected = self._collect()
            with self.gate.closed():
                self.buffer, self.cursor = collected
        groups = self.config.rollout.prompts_per_step
        return self.buffer[: groups * self.config.rollout.samples_per_prompt]

    def _collect(self) -> tuple[list[Sample], int]:
        rollout = self.config.rollout
        count = rollout.prompts_per_step * rollout.steps_per_batch
        prompts = self.train_data.take(self.cursor, count, self.config.seed)
        with self.clock.phase("rollout"):
            self.sampler.update_weights(self.step, rollout.max_staleness, self.placement)
        samples = self.placement.share_out(
            prompts, rollout.samples_per_prompt, self._roll_out, self.gate
        )
        return samples, self.cursor + count

    def _roll_out(self, prompts: list[Prompt]) -> list[Sample]:
        rollout = self.config.rollout
        with self.clock.phase("rollout"):
            rollouts = self.sampler.sample(
                prompts, rollout.samples_per_prompt, key=(self.config.seed, self.step)
            )
        self.clock.note(self.sampler.metrics())
        tokens = sum(len(r.response_ids) for r in rollouts)
        with self.clock.phase("rollout", tokens):
            rewards = score_rollouts(self.reward, rollouts)
        rollouts = [replace(r, reward=v) for r, v in zip(rollouts, rewards, strict=True)]
        with self.clock.phase("critic", tokens if self.maker.condition.context else 0):
            feedback = self.maker(rollouts)
        return self.make_samples(rollouts, feedback)

    def make_samples(self, rollouts: list[Rollout], feedback: list[Feedback]) -> list[Sample]:
        """Whole groups of rollouts with their prompts rendered and advantages computed."""
        size = self.config.rollout.samples_per_prompt
        dropped = dropped_rollouts(rollouts, feedback, self.config.critic.on_invalid)
        rewards = [None if gone else r.reward for r, gone in zip(rollouts, dropped, strict=True)]
        advantages = [
            advantage
            for start in range(0, len(rollouts), size)
            for advantage in group_advantages(rewards[start : start + size])
        ]
        template = self.maker.template
        return make_samples(self.renderer, template, rollouts, feedback, advantages, dropped)

    def micro_batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """What this rank computes of a step's samples."""
        budget, ranks = self.config.optim.micro_batch_tokens, self.world.size
        if ranks == 1:
            return micro_batches(samples, budget)
        return micro_batches_by_rank(samples, budget, ranks)[self.world.rank]

    def passes(self, batch: MicroBatch, teaches: bool) -> Passes:
        """The student's and, where it teaches, the teacher's forward passes over a micro-batch."""
        self.gate.agree()
        return Passes(self.policy, self.teacher if teaches else None, batch, self.clock)

    def advance(self) -> None:
        """The samples of `next_samples` have been trained on."""
        rollout = self.config.rollout
        self.buffer = self.buffer[rollout.prompts_per_step * rollout.samples_per_prompt :]
        self.step += 1

    # -- evaluation -------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.step >= self.config.optim.steps

    def evaluate_if_due(self) -> None:
        """Before the first update, every eval.every updates, and at the end; never twice."""
        every = self.config.eval.every
        due = self.step == 0 or self.done or (every and self.step % every == 0)
        if not due or self.world.lead(self._is_evaluated):
            return
        self.sampler.update_weights(self.step, placement=self.placement)
        config = self.config.eval
        prompts = self.eval_prompts(config.questions)
        scored = self.placement.share_out(
            prompts,
            config.samples,
            lambda some: scored_samples(self, some, config),
            self.gate,
        )
        result = tabulate(*zip(*scored, strict=True), samples=config.samples)
        with self.gate.closed():
            self.world.lead(lambda: append_evaluation(self.run_dir, self.step, result))

    def _is_evaluated(self) -> bool:
        return any(step == self.step for step, _ in read_evaluations(self.run_dir))

    # -- state ------------------------------------------------------------------------------------

    def save_if_due(self) -> None:
        every = self.config.checkpoint.every
        if self.done or (every and self.step % every == 0):
            self.save()

    def save(self) -> Path:
        """Writes checkpoint-STEP: a Hugging Face folder plus the exact state of this session."""
        tensors = {f"optimizer/{k}": v for k, v in self.optimizer.state_tensors().items()}
        if self.teacher is not None:
            tensors |= {f"teacher/{k}": v for k, v in self.teacher.state_tensors().items()}
        tensors["torch_rng"] = torch.get_rng_state()
        state = {
            "step": self.step,
            "cursor": self.cursor,
            "optimizer": self.optimizer.state_json(),
            "guard": self.guard.state_json(),
            "buffer": [sample_to_json(sample) for sample in self.buffer],
            "config": binding_settings(self.config),
            "model": parameter_shapes(self.policy.model),
        }
        with self.gate.closed():
            save_model, keep = self.placement.saver(), self.config.checkpoint.keep
            return save_checkpoint(
                self.run_dir, self.step, save_model, tensors, state, keep, self.world
            )

    def restore(self) -> bool:
        """Continues the newest valid checkpoint of the run folder; False where there is none."""
        found = load_latest(self.run_dir, self.world)
        if found is None:
            return False
        refuse_other_settings(found.path, found.state["config"], self.config)
        refuse_other_model(found.path, found.state.get("model"), self.policy.model)
        self.optimizer.load(found.tensors.part("optimizer/"), found.state["optimizer"])
        if self.teacher is not None:
            self.teacher.load_state_tensors(found.tensors.part("teacher/"))
        self.guard.load(found.state["guard"])
        torch.set_rng_state(found.tensors.whole("torch_rng"))
        self.step, self.cursor = found.state["step"], found.state["cursor"]
        self.buffer = self._samples_from_json(found)
        return True

    def _samples_from_json(self, found: LoadedCheckpoint) -> list[Sample]:
        records = found.state["buffer"]
        if not records:
            return []
        rollout = self.config.rollout
        count = rollout.prompts_per_step * rollout.steps_per_batch
        prompts = self.train_data.take(self.cursor - count, count, self.config.seed)
        by_id = {prompt.id: prompt for prompt in prompts}
        refuse_other_data(found.path, records, by_id)
        return [sample_from_json(record, by_id[record["prompt"]]) for record in records]


def _loss_head(impl: str, policy: Policy) -> str:
    """The loss head that will run; an implementation that is not here is the user's to change."""
    try:
        name, why = implementation_choice(impl, policy.device, policy.dtype)
    except (RuntimeError, ValueError) as error:
        raise FastsdError(f"loss.impl: {error}") from error
    return f"{name} ({why})"


def refuse_used_folder(run_dir: Path) -> None:
    """A fresh run never writes into an old one's folder."""
    if run_dir.exists() and any(run_dir.iterdir()):
        raise FastsdError(
            f"run folder {run_dir} is not empty: continue it with --resume auto, or choose another "
            "with --run"
        )
