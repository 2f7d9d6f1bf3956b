"""The self-distillation loss of padded [B, T] completions, as SDPO and SDFT aggregate it.

    L = mean_B( sum_t mask rho D_t / max(1, sum_t mask) ),   rho = min(p_S(y) / p_old(y), is_clip)

(SDPO, arXiv 2601.20802.) rho is a constant, so mask, ratio and means are one weight per token and
the loss is one call of `fused_linear_loss`; old log-probs cost one GEMM more, for today's.
Shape suffixes: B sequences, T completion tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import fused_linear_loss, fused_linear_statistics
from ..loss_head.contract import LOG_RATIO_LIMIT


def completion_logprobs(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    ids_BT: Tensor,
    mask_BT: Tensor,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """[B, T] log p(ids), fp32 (fp64 for fp64 inputs), detached; 0 where the mask is 0.

    Raises: as `fused_linear_statistics`.
    """
    rows = hidden_BTD.flatten(0, 1), head_VD, ids_BT.flatten()
    options = {"mask_T": mask_BT.flatten(), "temperature": temperature, "impl": impl}
    return fused_linear_statistics(*rows, **options).student_logprob_T.view_as(ids_BT)


def completion_loss(
    student_BTD: Tensor,
    head_VD: Tensor,
    ids_BT: Tensor,
    mask_BT: Tensor,
    temperature: float = 1.0,
    impl: str = "auto",
    *,
    teacher_BTD: Tensor,
    teacher_head_VD: Tensor | None = None,
    old_logprob_BT: Tensor | None = None,
    is_clip: float | None = None,
    divergence: str = "reverse_kl",
    **divergence_options,
) -> tuple[Tensor, Tensor]:
    """L, and the detached mean of rho D_t over the tokens that count.

    Args: as `fused_linear_loss`, by sequence; mask_BT holds 0 and 1, and hidden states under a 0
    are never looked at. rho is 1 without old_logprob_BT or without is_clip. divergence_options:
    beta, top_k, tail, entry_clip. "sampled_token": D_t = stop_grad(log p_S(y) - log p_T(y)) log
    p_S(y).
    Raises: as `fused_linear_loss`.
    """
    mask_BT = mask_BT.to(torch.promote_types(student_BTD.dtype, torch.float32))
    counted_BT = mask_BT
    if old_logprob_BT is not None and is_clip is not None:
        now_BT = completion_logprobs(student_BTD, head_VD, ids_BT, mask_BT, temperature, impl)
        log_ratio_BT = (now_BT - old_logprob_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        counted_BT = mask_BT * log_ratio_BT.exp().clamp(max=is_clip)
    weight_BT = counted_BT / mask_BT.sum(1, keepdim=True).clamp(min=1) / mask_BT.shape[0]
    out = fused_linear_loss(
        student_BTD.flatten(0, 1),
        head_VD,
        ids_BT.flatten(),
        teacher_TD=teacher_BTD.flatten(0, 1),
        teacher_head_VD=teacher_head_VD,
        divergence_weight_T=weight_BT.flatten(),
        divergence=divergence,
        temperature=temperature,
        impl=impl,
        **divergence_options,
    )
    value_T = out.divergence_T
    assert value_T is not None  # there is a teacher
    if divergence == "sampled_token":
        value_T = value_T * out.student_logprob_T
    return out.loss, (value_T * counted_BT.flatten()).sum() / mask_BT.sum().clamp(min=1)
