"""One run's moving parts, put together from a configuration, saved and restored exactly.

A session stands between two optimizer steps: `step` updates are done, `cursor` prompts are taken,
`buffer` holds samples that were rolled out but not yet trained on. Together with the optimizer and
an averaged teacher that is the whole state; all randomness is a function of (seed, step, prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastsd.checkpoint import load_latest, save_checkpoint
from fastsd.conditions import CONDITIONS
from fastsd.config import Config
from fastsd.errors import FastsdError
from fastsd.evaluation.results import scored_samples, tabulate
from fastsd.evaluation.solver import Solver
from fastsd.model.micro_batches import MicroBatch, micro_batches, micro_batches_by_rank
from fastsd.parallel.placement import place_weights, refuse_ranks
from fastsd.prompts.sources import required_fields
from fastsd.records.folder import append_evaluation, read_evaluations
from fastsd.runtime.agreement import refuse_other_start
from fastsd.runtime.hardware import resolve_device, resolve_dtype
from fastsd.runtime.phases import PhaseClock
from fastsd.runtime.signals import SignalGate
from fastsd.runtime.world import World, open_world
from fastsd.teachers.passes import Passes
from fastsd.teachers.self_teacher import Teacher
from fastsd.training.collect import collect
from fastsd.training.feedback import feedback_maker
from fastsd.training.guards import Guard
from fastsd.training.optimizer import Optimizer
from fastsd.training.preflight import check_prompts, refuse_other_inputs
from fastsd.training.state import load_state, state_of
from fastsd.types import Sample
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
        self.loss_head = _loss_head(config, self.world)
        super().__init__(config, run_dir, required_fields(config), self.world)
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
            collected = collect(self)
            with self.gate.closed():
                self.buffer, self.cursor = collected
        groups = self.config.rollout.prompts_per_step
        return self.buffer[: groups * self.config.rollout.samples_per_prompt]

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
        tensors, state = state_of(self)
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
        load_state(self, found)
        return True


def _loss_head(config: Config, world: World) -> str:
    """The loss head that will run; an implementation that is not here is the user's to change."""
    device = resolve_device(config.device, world.local_rank)
    dtype = resolve_dtype(config.model.dtype, device)
    try:
        name, why = implementation_choice(config.loss.impl, device, dtype)
    except (RuntimeError, ValueError) as error:
        raise FastsdError(f"loss.impl: {error}") from error
    return f"{name} ({why})"
