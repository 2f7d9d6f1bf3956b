"""Samples to the scalar that is differentiated. The global token mean lives here and only here.

    L = 1/N_div * sum_t w_div D_t  +  1/N_pol * sum_t P_t  -  1/N * sum_t w_ent H_t

over all response tokens of the optimizer step, whatever micro-batches it is split into:
N_div counts tokens of rollouts with a teacher, N_pol tokens of rollouts with a reward (a group
without spread counts, with weight zero), N all tokens.

Shapes: T response tokens of a micro-batch, packed; D hidden.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsd.feedback import FeedbackMaker
from fastsd.layout import Sample
from fastsd.types import StepMetrics
from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head import LossHeadOutput

if TYPE_CHECKING:
    from fastsd.session import Session


@dataclass(frozen=True)
class TokenWeights:
    """Per-token weights of the three terms for one optimizer step, already divided by N."""

    divergence: float
    policy: float
    entropy: float

    @classmethod
    def for_step(cls, samples: Sequence[Sample], maker: FeedbackMaker) -> TokenWeights:
        def mean(weight: float, counted: Sequence[Sample]) -> float:
            tokens = sum(len(sample.rollout.response_ids) for sample in counted)
            return weight / tokens if tokens else 0.0

        kept = [sample for sample in samples if not sample.dropped]
        return cls(
            mean(maker.divergence_weight, [s for s in kept if s.teacher_ids is not None]),
            mean(maker.policy_weight, [s for s in kept if s.rollout.reward is not None]),
            mean(maker.config.loss.entropy_weight, kept),
        )

    def counts(self, sample: Sample) -> bool:
        """Whether the sample moves the loss at all; the others need no forward pass."""
        if sample.dropped:
            return False
        has_teacher = self.divergence != 0 and sample.teacher_ids is not None
        return has_teacher or self.policy * sample.advantage != 0 or self.entropy != 0


def loss_head(
    student_TD: Tensor,
    teacher_TD: Tensor | None,
    samples: Sequence[Sample],
    weights: TokenWeights,
    session: Session,
) -> LossHeadOutput:
    """The fused loss head on one micro-batch; `samples` in the order of the hidden states."""
    config, policy, device = session.config, session.policy, student_TD.device
    target_T = torch.tensor([i for s in samples for i in s.rollout.response_ids], device=device)
    options: dict = dict(policy.head_options(), temperature=config.rollout.temperature)
    if teacher_TD is not None and session.teacher is not None:
        with_teacher = [float(s.teacher_ids is not None) for s in samples]
        options |= {
            "teacher_TD": teacher_TD,
            "teacher_head_VD": session.teacher.head_VD,
            "divergence_weight_T": _per_token(with_teacher, samples, device) * weights.divergence,
            "divergence": config.loss.divergence,
            "beta": config.loss.beta,
            "top_k": config.loss.top_k,
            "tail": config.loss.tail,
            "entry_clip": config.loss.entry_clip,
        }
    if weights.policy:
        advantages = [sample.advantage for sample in samples]
        options["policy_weight_T"] = _per_token(advantages, samples, device) * weights.policy
    if weights.policy and config.loss.clip is not None:
        old = [logprob for s in samples for logprob in s.rollout.logprobs]
        options |= {"old_logprob_T": torch.tensor(old, device=device), "clip": config.loss.clip}
    if weights.entropy:
        ones = [1.0] * len(samples)
        options["entropy_weight_T"] = _per_token(ones, samples, device) * weights.entropy
    return fused_linear_loss(student_TD, policy.head_VD, target_T, impl=config.loss.impl, **options)


def _per_token(values: Sequence[float], samples: Sequence[Sample], device) -> Tensor:
    """One value per sample -> one per response token."""
    lengths = [len(sample.rollout.response_ids) for sample in samples]
    return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(device)


class StepStatistics:
    """Adds up what the loss head saw of one optimizer step; `metrics` turns it into numbers."""

    def __init__(self, samples: Sequence[Sample]):
        self.samples = samples
        self.loss = 0.0
        self.tokens = 0
        self.sums: dict[str, float] = {}
        self.divergence_of: dict[int, float] = {}
        self.extra: StepMetrics = {}

    def add(self, batch: Sequence[Sample], out: LossHeadOutput) -> None:
        self.loss += float(out.loss.detach())
        self.tokens += len(out.student_logprob_T)
        self._sum("entropy/mean", out.entropy_T)
        if out.policy_clipped_T is not None:
            self._sum("policy/clipped_share", out.policy_clipped_T)
        if out.entry_clipped_T is not None:
            self._sum("divergence/clipped_entries", out.entry_clipped_T)
        if out.divergence_T is None:
            return
        lengths = [len(sample.rollout.response_ids) for sample in batch]
        for sample, part in zip(batch, out.divergence_T.split(lengths), strict=True):
            if sample.teacher_ids is not None:
                self.divergence_of[id(sample)] = float(part.mean())
                self._sum("divergence/mean", part)
                self.sums["taught"] = self.sums.get("taught", 0.0) + len(part)

    def divergence(self, sample: Sample) -> float | None:
        """Mean divergence over the sample's tokens; None where it had no teacher."""
        return self.divergence_of.get(id(sample))

    def metrics(self) -> StepMetrics:
        rollouts = [sample.rollout for sample in self.samples]
        rewards = [r.reward for r in rollouts if r.reward is not None]
        lengths = [len(r.response_ids) for r in rollouts]
        taught = self.sums.pop("taught", 0.0)
        values = {
            name: total / (taught if name == "divergence/mean" else self.tokens)
            for name, total in self.sums.items()
        }
        logprobs = math.fsum(logprob for r in rollouts for logprob in r.logprobs)
        return {
            "loss": self.loss,
            **values,
            "reward/mean": sum(rewards) / len(rewards) if rewards else math.nan,
            "reward/missing_share": 1 - len(rewards) / len(rollouts),
            "surprisal": -logprobs / sum(lengths),
            "length/mean": sum(lengths) / len(lengths),
            "length/truncated_share": sum(r.truncated for r in rollouts) / len(rollouts),
            "feedback/missing_share": _share(s.feedback is None for s in self.samples),
            "feedback/cut_share": _share(s.feedback_cut for s in self.samples),
            **self._feedback_problems(),
            "trained_tokens": float(self.tokens),
            **self.extra,
        }

    def _feedback_problems(self) -> StepMetrics:
        """How many rollouts each class of failure left without feedback, and how much of the
        attempts the critiques repeat. Nothing where no critic was asked."""
        problems = Counter(s.problem for s in self.samples if s.problem is not None)
        shares = [s.prefix_share for s in self.samples if s.prefix_share is not None]
        values = {f"feedback/problem/{name}": float(n) for name, n in sorted(problems.items())}
        if shares:
            values["feedback/verbatim_share"] = sum(shares) / len(shares)
        if problems:
            values["feedback/dropped_share"] = _share(s.dropped for s in self.samples)
        return values

    def _sum(self, name: str, values_T: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values_T.sum())


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)
