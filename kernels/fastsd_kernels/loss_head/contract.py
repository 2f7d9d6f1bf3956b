"""What every implementation of the loss head receives and returns.

An implementation is a module with three functions. The first two see only the rows that count, at
least one; weights and targets are cast, everything is detached, autocast is off:

    evaluate(inputs, options, wanted)  -> Evaluation, its loss's gradients formed on the way
    statistics(inputs, options)        -> RowStatistics
    why_not(device, dtype)             -> None where it can run, else the reason and what to do

None of the tensors they return may share memory with another or with an input.
Shape suffixes: T rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A probability ratio is exp of a log-ratio clamped to this range, as in SDPO: it stays finite.
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Options:
    """The settings of a call; the defaults of all four public functions are these.

    As an implementation sees them they are validated: jsd has 0 < beta < 1 and top_k < V; their
    limits are other settings.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    top_k: int | None = None
    tail: bool = True
    entry_clip: float | None = None
    clip: float | None = None


@dataclass(frozen=True)
class Inputs:
    """Validated tensors. Everything but student_TD, head_VD and bias_V is a constant."""

    student_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    bias_V: Tensor | None = None
    teacher_TD: Tensor | None = None
    teacher_head_VD: Tensor | None = None
    divergence_weight_T: Tensor | None = None
    policy_weight_T: Tensor | None = None
    old_logprob_T: Tensor | None = None
    entropy_weight_T: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What may have a gradient."""
        return self.student_TD, self.head_VD, self.bias_V

    def wanted(self) -> list[bool]:
        """Of each leaf, whether autograd wants its gradient now."""
        train = torch.is_grad_enabled()
        return [train and isinstance(x, Tensor) and x.requires_grad for x in self.leaves]

    @property
    def statistics_dtype(self) -> torch.dtype:
        return statistics_dtype(self.student_TD)


@dataclass(frozen=True)
class RowStatistics:
    """Detached values by row; None where the call has no such thing."""

    student_logprob_T: Tensor
    entropy_T: Tensor
    divergence_T: Tensor | None = None
    teacher_logprob_T: Tensor | None = None
    policy_clipped_T: Tensor | None = None
    entry_clipped_T: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns; nothing in it carries a graph.

    loss: the scalar sum over rows, in the statistics' dtype.
    gradients: dloss / d (student_TD, head_VD, bias_V), each in its input's dtype and shape; None
    where `wanted`, three bools in this order, does not ask for it.
    """

    loss: Tensor
    statistics: RowStatistics
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LossHeadStatistics(RowStatistics):
    """Detached statistics of all T rows, fp32 (fp64 for fp64 inputs); rows dropped report 0.

    student_logprob_T: log p_S(y_t).  entropy_T: H of the student, nats.
    divergence_T: D_t; for sampled_token log p_S(y_t) - log p_T(y_t), the one-sample estimate of
    KL(S||T).  teacher_logprob_T: log p_T(y_t).  Both None without a teacher.
    policy_clipped_T: bool, the PPO clip holds the row's gradient back; None without `clip`.
    entry_clipped_T: int64, vocabulary entries held at `entry_clip`; None without `entry_clip`.
    impl: the implementation that ran.
    """

    impl: str = ""


@dataclass(frozen=True)
class LossHeadOutput(LossHeadStatistics):
    """LossHeadStatistics and `loss`, the scalar sum over rows, differentiable."""

    loss: Tensor = None  # type: ignore[assignment]  # dataclass order: fields above have defaults


def statistics_dtype(hidden_TD: Tensor) -> torch.dtype:
    """Logits and statistics are fp32, or fp64 where the inputs are."""
    return torch.promote_types(hidden_TD.dtype, torch.float32)
