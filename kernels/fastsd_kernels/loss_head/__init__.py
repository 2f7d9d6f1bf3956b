"""hidden x head -> divergences, log-probs, entropy and the gradient of the loss; never [T, V].

The mathematics is `reference.py`; an implementation is a private module with the functions that
`contract.py` describes, and implementations never import each other. Here: the public interface.
It checks, casts under autocast and calls the operators of `op.py`, which drop the rows that cannot
contribute and choose the implementation.
Shape suffixes: T rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import autocast_dtype
from .contract import Inputs, LossHeadOutput, LossHeadStatistics, Options
from .dispatch import implementation_choice, implementation_name
from .op import STATISTICS, has_statistic, linear_loss, linear_statistics
from .validation import check_inputs, check_options, check_terms

__all__ = [
    "LossHeadOutput",
    "LossHeadStatistics",
    "fused_linear_loss",
    "fused_linear_statistics",
    "implementation_choice",
    "implementation_name",
]


def fused_linear_loss(
    student_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    teacher_TD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    divergence_weight_T: Tensor | None = None,
    policy_weight_T: Tensor | None = None,
    old_logprob_T: Tensor | None = None,
    clip: float | None = Options.clip,
    entropy_weight_T: Tensor | None = None,
    divergence: str = Options.divergence,
    beta: float = Options.beta,
    temperature: float = Options.temperature,
    logit_scale: float = Options.logit_scale,
    softcap: float | None = Options.softcap,
    top_k: int | None = Options.top_k,
    tail: bool = Options.tail,
    entry_clip: float | None = Options.entry_clip,
    impl: str = "auto",
) -> LossHeadOutput:
    """sum_t [ w_div D_t + P_t - w_ent H_t ] from hidden states, without [T, V] logits.

        z = softcap(logit_scale * (h W^T + b)) / temperature, in fp32 or better, on both sides
        S = softmax of the student's z, T of the teacher's;  softcap(x) = c tanh(x / c)
        P_t = -w_pol log p_S(y_t)                                   no old_logprob_T
            = -rho w_pol,  rho = p_S(y_t) / p_old(y_t)              old_logprob_T, no clip
            = -min(rho w_pol, clamp(rho, 1-clip, 1+clip) w_pol)     both (PPO)
        rho is exp of a log-ratio clamped to +-20, with no gradient outside. H_t: entropy of S.

    Args:
        student_TD: [T, D] hidden states, differentiable; bf16, fp16, fp32 or fp64.
        head_VD: [V, D] language-model head, same dtype, differentiable. Its gradient is left out
            of the work when it does not require one.
        target_T: [T] int64 or int32, the sampled tokens y_t. Anything on rows that do not count.
        teacher_TD: [T, D] (or [T, D'] with a head of its own). The teacher is a constant: no
            gradient reaches teacher_TD, teacher_head_VD or the teacher's use of head_VD and bias_V.
        teacher_head_VD: [V, D'], default head_VD.
        bias_V: [V], added on both sides, differentiable through the student's.
        divergence_weight_T: [T] w_div; None with a teacher: 1 on every row.
        policy_weight_T: [T] w_pol, e.g. advantages; None: no policy term.
        old_logprob_T, clip: [T] log p_old(y_t) and the PPO clip, see P_t; they need
            policy_weight_T, and clip needs old_logprob_T.
        entropy_weight_T: [T] w_ent; None: no entropy term.
        divergence: D_t. "forward_kl" = KL(T||S) = sum T log(T/S). "reverse_kl" = KL(S||T)
            = sum S log(S/T). "jsd" = beta KL(T||m) + (1-beta) KL(S||m), m = (1-beta) S + beta T;
            beta=0 is forward_kl, beta=1 is reverse_kl (generalised JSD, arXiv 2306.13649).
            "sampled_token": reverse KL's policy-gradient form, stop_grad(log p_S(y) - log p_T(y))
            * log p_S(y), which is also its value in the loss.
        top_k, tail: D_t over the student's k likeliest entries, and one bucket for all others,
            log(-expm1(logsumexp)) (tail=True, SDPO arXiv 2601.20802) or renormalised over the k
            (tail=False). Which entries those are carries no gradient. None or V: full vocabulary.
        entry_clip: each summand of D_t is clamped to at most this before the sum (OPSD, arXiv
            2601.18734); a clamped summand has no gradient.
        impl: "auto" (triton on CUDA, native on CPUs, chunked where neither can run), "reference",
            "chunked" (plain torch), "native" (C++) or "triton". An explicit choice never falls
            back.

    A row whose given weights are all zero is dropped before any GEMM: its hidden states and target
    may hold anything, its statistics are 0. Weights are constants. Under autocast the matrices are
    cast to the autocast dtype first. The gradient is formed with the loss, so `.loss` is
    differentiable once; it may be used in any graph, scaled by anything, and compiled with
    fullgraph=True. While a CUDA graph is captured, values of weights and targets go unchecked.

    Returns: LossHeadOutput; `.loss` is fp32 (fp64 for fp64 inputs).

    Raises: ValueError or TypeError naming the argument, what was found and what was expected (while
        compiling, inside the compiler's own exception); RuntimeError with the reason and what to
        do for a named implementation that cannot run here.
    """
    inputs = Inputs(
        student_TD, head_VD, target_T, bias_V, teacher_TD, teacher_head_VD,
        divergence_weight_T, policy_weight_T, old_logprob_T, entropy_weight_T,
    )  # fmt: skip
    options = Options(
        divergence, beta, temperature, logit_scale, softcap, top_k, tail, entry_clip, clip
    )
    if not torch.compiler.is_compiling():  # the operator and its fake check too
        check_inputs(inputs)
        check_terms(inputs, check_options(head_VD, options))
    inputs = _prepared(inputs)
    name = _resolved(impl, inputs)
    flat = (*vars(inputs).values(), *vars(options).values())
    loss, _, _, _, *rows = linear_loss(*flat, name, inputs.wanted())
    return LossHeadOutput(loss=loss, impl=name, **_named(rows, inputs, options))


def fused_linear_statistics(
    student_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    teacher_TD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    mask_T: Tensor | None = None,
    divergence: str = Options.divergence,
    beta: float = Options.beta,
    temperature: float = Options.temperature,
    logit_scale: float = Options.logit_scale,
    softcap: float | None = Options.softcap,
    top_k: int | None = Options.top_k,
    tail: bool = Options.tail,
    entry_clip: float | None = Options.entry_clip,
    impl: str = "auto",
) -> LossHeadStatistics:
    """The detached statistics of `fused_linear_loss`, at two GEMMs (one without a teacher).

    Args as there; mask_T: [T] bool or numbers, rows where it is zero are dropped and report 0.
    Returns: LossHeadStatistics.  Raises: as `fused_linear_loss`.
    """
    inputs = Inputs(student_TD, head_VD, target_T, bias_V, teacher_TD, teacher_head_VD)
    options = Options(divergence, beta, temperature, logit_scale, softcap, top_k, tail, entry_clip)
    if not torch.compiler.is_compiling():
        check_inputs(inputs, mask_T)
        check_options(head_VD, options)
    inputs = _prepared(inputs)
    name = _resolved(impl, inputs)
    tensors, settings = list(vars(inputs).values())[:6], list(vars(options).values())[:-1]
    rows = linear_statistics(*tensors, mask_T, *settings, name)
    return LossHeadStatistics(impl=name, **_named(rows, inputs, options))


def _prepared(inputs: Inputs) -> Inputs:
    """Matrices in the autocast dtype, if there is one; constants without a graph."""
    values: dict[str, Any] = dict(vars(inputs))
    dtype = autocast_dtype(inputs.student_TD.device)
    if dtype is not None:
        own = inputs.teacher_head_VD
        if not torch.compiler.is_compiling() and own is not None and own.is_set_to(inputs.head_VD):
            values["teacher_head_VD"] = None  # the same memory: cast once
        for name in ("student_TD", "head_VD", "teacher_TD", "teacher_head_VD"):
            if values[name] is not None:
                values[name] = values[name].to(dtype)
    for name, value in values.items():
        if value is not None and name not in ("student_TD", "head_VD", "bias_V"):
            values[name] = value.detach()
    return Inputs(**values)


def _resolved(impl: str, inputs: Inputs) -> str:
    return implementation_name(impl, inputs.student_TD.device, inputs.student_TD.dtype)


def _named(rows: Sequence[Tensor], inputs: Inputs, options: Options) -> dict[str, Any]:
    """Statistics by name, None where the call has no such thing."""
    return {
        name: value_T if has_statistic(name, inputs, options) else None
        for name, value_T in zip(STATISTICS, rows, strict=True)
    }
