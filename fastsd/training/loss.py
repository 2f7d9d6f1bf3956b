"""Samples to the scalar that is differentiated. The global token mean lives here and only here.

    L = 1/N_div * sum_t w_div D_t  +  1/N_pol * sum_t P_t  -  1/N * sum_t w_ent H_t

over all response tokens of the optimizer step, whatever micro-batches it is split into:
N_div counts tokens of rollouts with a teacher, N_pol tokens of rollouts with a reward (a group
without spread counts, with weight zero), N all tokens.

Shapes: T response tokens of a micro-batch, packed; D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd.config import Config
from fastsd.teachers.self_teacher import Teacher
from fastsd.training.feedback import FeedbackMaker
from fastsd.types import Sample
from fastsd_kernels.loss_head import LossHeadOutput


@dataclass(frozen=True)
class TokenWeights:
    """Per-token weights of the three terms for one optimizer step, already divided by N."""

    divergence: float
    policy: float
    entropy: float

    @classmethod
    def for_step(cls, samples: Sequence[Sample], maker: FeedbackMaker) -> TokenWeights:
        """Of all samples of the step: the condition's weights over the tokens that each counts."""

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
    config: Config,
    teacher: Teacher | None,
    head: Callable[[Tensor, Tensor, Mapping[str, Any]], LossHeadOutput],
) -> LossHeadOutput:
    """The fused loss head on one micro-batch; `samples` in the order of the hidden states.

    head: `fused_linear_loss` with the policy's own weight, wherever that lies, as a function of
    (student_TD, target_T, its other arguments).
    """
    device = student_TD.device
    target_T = torch.tensor([i for s in samples for i in s.rollout.response_ids], device=device)
    options: dict = {"temperature": config.rollout.temperature}
    if teacher_TD is not None and teacher is not None:
        with_teacher = [float(s.teacher_ids is not None and not s.dropped) for s in samples]
        options |= {
            "teacher_TD": teacher_TD,
            "teacher_head_VD": teacher.head_VD,
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
    return head(student_TD, target_T, options)


def _per_token(values: Sequence[float], samples: Sequence[Sample], device) -> Tensor:
    """One value per sample -> one per response token."""
    lengths = [len(sample.rollout.response_ids) for sample in samples]
    return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(device)
