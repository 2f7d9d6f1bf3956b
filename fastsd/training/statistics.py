"""What one optimizer step was: sums over tokens as they are made, then metrics.

Units: log-probs, divergence and entropy in nats; means are over tokens, shares over what they name.

Shapes: T response tokens of a part of a micro-batch.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsd.runtime.world import World
from fastsd.types import Sample, StepMetrics
from fastsd_kernels.loss_head import LossHeadOutput


@dataclass
class Sums:
    """Over the rows that one rank's loss heads saw; of many ranks, added up in their order.

    divergence_of: by the sample's index in the step, its mean over tokens. logprob_gaps: |trained
    on - sampled with| of each token, fp32.
    """

    loss: float = 0.0
    tokens: int = 0
    taught_tokens: int = 0
    by_name: dict[str, float] = field(default_factory=dict)
    divergence_of: dict[int, float] = field(default_factory=dict)
    logprob_gaps: list[Tensor] = field(default_factory=list)

    def add(self, name: str, values_T: Tensor) -> None:
        self.by_name[name] = self.by_name.get(name, 0.0) + float(values_T.sum())

    @classmethod
    def of_ranks(cls, ranks: Sequence[Sums]) -> Sums:
        names = dict.fromkeys(name for part in ranks for name in part.by_name)
        return cls(
            loss=sum(part.loss for part in ranks),
            tokens=sum(part.tokens for part in ranks),
            taught_tokens=sum(part.taught_tokens for part in ranks),
            by_name={n: sum(part.by_name.get(n, 0.0) for part in ranks) for n in names},
            divergence_of={i: v for part in ranks for i, v in part.divergence_of.items()},
            logprob_gaps=[gap_T for part in ranks for gap_T in part.logprob_gaps],
        )


class StepStatistics:
    """Adds up what the loss head saw of one optimizer step; `metrics` turns it into numbers."""

    def __init__(self, samples: Sequence[Sample]):
        self.samples = samples
        self.sums = Sums()
        self.extra: StepMetrics = {}
        self._index_of = {id(sample): index for index, sample in enumerate(samples)}

    @property
    def loss(self) -> float:
        return self.sums.loss

    @property
    def tokens(self) -> int:
        return self.sums.tokens

    def add(self, batch: Sequence[Sample], out: LossHeadOutput) -> None:
        """One part of a micro-batch: its samples in the order of the head's rows."""
        sums = self.sums
        sums.loss += float(out.loss.detach())
        # Padding, which counts for nothing, stands last.
        kept = [sample for sample in batch if not sample.dropped]
        sampled = [logprob for s in kept for logprob in s.rollout.logprobs]
        rows = slice(len(sampled))
        sums.tokens += len(sampled)
        logprob_T = out.student_logprob_T[rows].detach().cpu()
        sums.logprob_gaps.append((logprob_T - torch.tensor(sampled, dtype=logprob_T.dtype)).abs())
        sums.add("entropy/mean", out.entropy_T[rows])
        if out.policy_clipped_T is not None:
            sums.add("policy/clipped_share", out.policy_clipped_T[rows])
        if out.entry_clipped_T is not None:
            sums.add("divergence/clipped_entries", out.entry_clipped_T[rows])
        if out.divergence_T is None:
            return
        lengths = [len(sample.rollout.response_ids) for sample in kept]
        for sample, part in zip(kept, out.divergence_T[rows].split(lengths), strict=True):
            if sample.teacher_ids is not None:
                sums.divergence_of[self._index_of[id(sample)]] = float(part.mean())
                sums.add("divergence/mean", part)
                sums.taught_tokens += len(part)

    def add_ranks(self, world: World) -> None:
        """Makes these the statistics of all ranks' micro-batches: a collective call."""
        if world.size > 1:
            self.sums = Sums.of_ranks(world.gather(self.sums))

    def divergence(self, index: int) -> float | None:
        """Mean over the tokens of the step's index-th sample; None where it had no teacher."""
        return self.sums.divergence_of.get(index)

    def metrics(self) -> StepMetrics:
        """The step as flat numbers; only what was computed is among them."""
        rollouts = [sample.rollout for sample in self.samples]
        rewards = [r.reward for r in rollouts if r.reward is not None]
        lengths = [len(r.response_ids) for r in rollouts]
        counts = {"divergence/mean": self.sums.taught_tokens}
        values = {n: total / counts.get(n, self.tokens) for n, total in self.sums.by_name.items()}
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
        if not self.sums.logprob_gaps:
            return {}
        gap_T = torch.cat(self.sums.logprob_gaps)
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


def repeated_share(ids: Sequence[int], n: int = 4) -> float:
    """Share of a sequence's n-grams that it had before: 0 where all differ or none fits in."""
    grams = len(ids) - n + 1
    if grams < 1:
        return 0.0
    return 1 - len(set(zip(*(ids[i:] for i in range(n)), strict=False))) / grams


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)
