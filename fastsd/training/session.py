"""One run's moving parts, put together from a configuration, saved and restored exactly.

A session stands between two optimizer steps: `step` updates are done, `cursor` prompts are taken,
`buffer` holds samples that were rolled out but not yet trained on. Together with the optimizer and
an averaged teacher that is the whole state; all randomness is a function of (seed, step, prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastsd.checkpoint import load_latest, save_checkpoint
from fastsd.evaluation.results import scored_samples, tabulate
from fastsd.model.micro_batches import MicroBatch, micro_batches, micro_batches_by_rank
from fastsd.records.folder import append_evaluation, read_evaluations
from fastsd.teachers.passes import Passes
from fastsd.training.collect import collect
from fastsd.training.parts import Parts
from fastsd.training.state import load_state, state_of
from fastsd.types import Sample


class Session(Parts):
    """A run between two optimizer steps: what it does next, and what is kept of it."""

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
