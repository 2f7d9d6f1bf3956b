"""Samples to the scalar that is differentiated. The global token mean lives here and only here.

    L = 1/N_div * sum_t w_div D_t  +  1/N_pol * sum_t P_t  -  1/N * sum_t w_ent H_t

over all response tokens of the optimizer step, whatever micro-batches it is split into:
N_div counts tokens of rollouts with a teacher, N_pol tokens of rollouts with a reward (a group
without spread counts, with weight zero), N all tokens.

Shapes: T response tokens of a micro-batch, packed; D hidden.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsd.runtime.world import World
from fastsd.training.feedback import FeedbackMaker
from fastsd.types import Sample, StepMetrics
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
        divergence, policy = maker.weights
        return cls(
            mean(divergence, [s for s in kept if s.teacher_ids is not None]),
            mean(policy, [s for s in kept if s.rollout.reward is not None]),
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
    config, device = session.config, student_TD.device
    target_T = torch.tensor([i for s in samples for i in s.rollout.response_ids], device=device)
    options: dict = {"temperature": config.rollout.temperature}
    if teacher_TD is not None and session.teacher is not None:
        with_teacher = [float(s.teacher_ids is not None and not s.dropped) for s in samples]
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
        advantages = [0.0 if sample.dropped else sample.advantage for sample in samples]
        options["policy_weight_T"] = _per_token(advantages, samples, device) * weights.policy
    if weights.policy and config.loss.clip is not None:
        old = [logprob for s in samples for logprob in s.rollout.logprobs]
        options |= {"old_logprob_T": torch.tensor(old, device=device), "clip": config.loss.clip}
    if weights.entropy:
        ones = [float(not sample.dropped) for sample in samples]
        options["entropy_weight_T"] = _per_token(ones, samples, device) * weights.entropy
    return session.placement.loss_head(student_TD, target_T, options)


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
        self.taught_tokens = 0
        self.sums: dict[str, float] = {}
        self.divergence_of: dict[int, float] = {}
        self.logprob_gaps: list[Tensor] = []
        self.extra: StepMetrics = {}

    def add(self, batch: Sequence[Sample], out: LossHeadOutput) -> None:
        self.loss += float(out.loss.detach())
        # Padding, which counts for nothing, stands last.
        kept = [sample for sample in batch if not sample.dropped]
        sampled = [logprob for s in kept for logprob in s.rollout.logprobs]
        rows = slice(len(sampled))
        self.tokens += len(sampled)
        logprob_T = out.student_logprob_T[rows].detach().cpu()
        self.logprob_gaps.append((logprob_T - torch.tensor(sampled, dtype=logprob_T.dtype)).abs())
        self._sum("entropy/mean", out.entropy_T[rows])
        if out.policy_clipped_T is not None:
            self._sum("policy/clipped_share", out.policy_clipped_T[rows])
        if out.entry_clipped_T is not None:
            self._sum("divergence/clipped_entries", out.entry_clipped_T[rows])
        if out.divergence_T is None:
            return
        lengths = [len(sample.rollout.response_ids) for sample in kept]
        for sample, part in zip(kept, out.divergence_T[rows].split(lengths), strict=True):
            if sample.teacher_ids is not None:
                self.divergence_of[id(sample)] = float(part.mean())
                self._sum("divergence/mean", part)
                self.taught_tokens += len(part)

    def add_ranks(self, world: World) -> None:
        """Makes these the statistics of all ranks' micro-batches: a collective call."""
        if world.size == 1:
            return
        at = {id(sample): index for index, sample in enumerate(self.samples)}
        divergence = {at[key]: value for key, value in self.divergence_of.items()}
        own = self.loss, self.tokens, self.taught_tokens, self.sums, divergence, self.logprob_gaps
        found = world.gather(own)
        self.loss = sum(part[0] for part in found)
        self.tokens = sum(part[1] for part in found)
        self.taught_tokens = sum(part[2] for part in found)
        names = dict.fromkeys(name for part in found for name in part[3])
        self.sums = {name: sum(part[3].get(name, 0.0) for part in found) for name in names}
        self.divergence_of = {
            id(self.samples[index]): value for part in found for index, value in part[4].items()
        }
        self.logprob_gaps = [gap_T for part in found for gap_T in part[5]]

    def divergence(self, sample: Sample) -> float | None:
        """Mean divergence over the sample's tokens; None where it had no teacher."""
        return self.divergence_of.get(id(sample))

    def metrics(self) -> StepMetrics:
        rollouts = [sample.rollout for sample in self.samples]
        rewards = [r.reward for r in rollouts if r.reward is not None]
        lengths = [len(r.response_ids) for r in rollouts]
        counts = {"divergence/mean": self.taught_tokens}
        values = {n: total / counts.get(n, self.tokens) for n, total in self.sums.items()}
        logprobs = math.fsum(logprob for r in rollouts for logprob in r.logprobs)
        return {
            "loss": self.loss,
            **values,
            "reward/mean": sum(rewards) / len(rewards) if rewards else math.nan,
            "reward/missing_share": 1 - len(rewards) / len(rollouts),
            "surprisal": -logprobs / sum(lengths),
            "length/mean": sum(lengths) / len(lengths),
            "length/truncated_share": sum(r.truncated for r in rollouts) / len(rollouts),
            "length/repetition": self._repetition,
            "feedback/missing_share": _share(s.feedback.text is None for s in self.samples),
            "feedback/cut_share": _share(s.feedback_cut for s in self.samples),
            **self._feedback_problems(),
            **self._logprob_gap(),
            "trained_tokens": float(self.tokens),
            **self.extra,
        }

    @functools.cached_property
    def _repetition(self) -> float:
        """Mean over rollouts of `repeated_share`; kept, for it costs more than other metrics."""
        shares = [repeated_share(sample.rollout.response_ids) for sample in self.samples]
        return sum(shares) / len(shares)

    def _logprob_gap(self) -> StepMetrics:
        """|log-prob trained on - log-prob sampled with|: the sampler's rounding, or its weights; in
        later steps of one batch of rollouts also how far the policy has moved."""
        if not self.logprob_gaps:
            return {}
        gap_T = torch.cat(self.logprob_gaps)
        # The value that 99 % do not exceed; torch.quantile refuses more than 16 million.
        rank = max(1, math.ceil(0.99 * len(gap_T)))
        p99 = float(gap_T.kthvalue(rank).values)
        return {"rollout/logprob_gap_mean": float(gap_T.mean()), "rollout/logprob_gap_p99": p99}

    def _feedback_problems(self) -> StepMetrics:
        """How many rollouts each class of failure left without feedback, and how much of the
        attempts the critiques repeat. Nothing where no critic was asked."""
        feedback = [sample.feedback for sample in self.samples]
        problems = Counter(f.problem for f in feedback if f.problem is not None)
        shares = [f.prefix_share for f in feedback if f.prefix_share is not None]
        values = {f"feedback/problem/{name}": float(n) for name, n in sorted(problems.items())}
        if shares:
            values["feedback/verbatim_share"] = sum(shares) / len(shares)
        if problems:
            values["feedback/dropped_share"] = _share(s.dropped for s in self.samples)
        return values

    def _sum(self, name: str, values_T: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values_T.sum())


def repeated_share(ids: Sequence[int], n: int = 4) -> float:
    """Share of a sequence's n-grams that it had before: 0 where all differ or none fits in."""
    grams = len(ids) - n + 1
    if grams < 1:
        return 0.0
    return 1 - len(set(zip(*(ids[i:] for i in range(n)), strict=False))) / grams


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)
