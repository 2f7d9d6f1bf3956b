"""hidden x head -> divergences, log-probs, entropy and the gradient of the loss; never [T, V].

The mathematics is `reference.py`; an implementation is a private module with the two functions
that `contract.py` describes, and implementations never import each other. Here: the public
interface and the choice of implementation. Rows that cannot contribute are dropped first.
Shape suffixes: T rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .contract import (
    Inputs,
    LossHeadOutput,
    LossHeadStatistics,
    RowStatistics,
    statistics_dtype,
)
from .validation import check_inputs, check_options, check_rows, check_terms

__all__ = ["LossHeadOutput", "LossHeadStatistics", "fused_linear_loss", "fused_linear_statistics"]

_BUILT = {"auto": "chunked", "reference": "reference", "chunked": "chunked"}
_NOT_BUILT = ("native", "triton")


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
    clip: float | None = None,
    entropy_weight_T: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    top_k: int | None = None,
    tail: bool = True,
    entry_clip: float | None = None,
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
        impl: "auto" (chunked today), "reference" or "chunked". An explicit choice never falls back.

    A row whose given weights are all zero is dropped before any GEMM: its hidden states and target
    may hold anything, its statistics are 0. Weights are constants. Under autocast the matrices are
    cast to the autocast dtype first.

    Returns: LossHeadOutput; `.loss` is fp32 (fp64 for fp64 inputs).

    Raises: ValueError or TypeError naming the argument, what was found and what was expected;
        NotImplementedError for an implementation that is not built.
    """
    options = check_options(
        head_VD, divergence=divergence, beta=beta, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, top_k=top_k, tail=tail, entry_clip=entry_clip,
        clip=clip,
    )  # fmt: skip
    inputs = Inputs(
        student_TD, head_VD, target_T, bias_V, teacher_TD, teacher_head_VD,
        divergence_weight_T, policy_weight_T, old_logprob_T, entropy_weight_T,
    )  # fmt: skip
    check_inputs(inputs)
    check_terms(inputs, options)
    weights = [x for x in (divergence_weight_T, policy_weight_T, entropy_weight_T) if x is not None]
    everything = teacher_TD is not None and divergence_weight_T is None
    mask_T = None if everything else torch.stack([w != 0 for w in weights]).any(0)
    inputs, rows_T = _keep(_prepared(inputs, everything), mask_T)
    check_rows(inputs, rows_T)
    implementation, name = _implementation(impl)
    loss, found = implementation.loss(inputs, options)
    return LossHeadOutput(loss=loss, impl=name, **_spread(found, rows_T, student_TD.shape[0]))


def fused_linear_statistics(
    student_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    teacher_TD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    mask_T: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    top_k: int | None = None,
    tail: bool = True,
    entry_clip: float | None = None,
    impl: str = "auto",
) -> LossHeadStatistics:
    """The detached statistics of `fused_linear_loss`, at two GEMMs (one without a teacher).

    Args as there; mask_T: [T] bool or numbers, rows where it is zero are dropped and report 0.
    Returns: LossHeadStatistics.  Raises: as `fused_linear_loss`.
    """
    options = check_options(
        head_VD, divergence=divergence, beta=beta, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, top_k=top_k, tail=tail, entry_clip=entry_clip,
        clip=None,
    )  # fmt: skip
    inputs = Inputs(student_TD, head_VD, target_T, bias_V, teacher_TD, teacher_head_VD)
    check_inputs(inputs, mask_T)
    with torch.no_grad():
        kept = None if mask_T is None else mask_T != 0
        inputs, rows_T = _keep(_prepared(inputs, unit_divergence=False), kept)
        check_rows(inputs, rows_T)
        implementation, name = _implementation(impl)
        found = implementation.statistics(inputs, options)
    return LossHeadStatistics(impl=name, **_spread(found, rows_T, student_TD.shape[0]))


def implementation_name(impl: str = "auto") -> str:
    """What `impl` runs here: "auto" resolved, any other name checked. Raises as the ops do."""
    return _implementation(impl)[1]


def _implementation(impl: str):
    if impl in _NOT_BUILT:
        raise NotImplementedError(
            f"impl={impl!r} is not built yet: use impl='chunked' (any device) or impl='auto'"
        )
    if impl not in _BUILT:
        choices = ", ".join([*_BUILT, *_NOT_BUILT])
        raise ValueError(f"impl: expected one of {choices}, got {impl!r}")
    return import_module(f"{__name__}.{_BUILT[impl]}"), _BUILT[impl]


def _prepared(inputs: Inputs, unit_divergence: bool) -> Inputs:
    """Constants detached and in the statistics' dtype, matrices in the autocast dtype if any."""
    device = inputs.student_TD.device.type
    values = {field.name: getattr(inputs, field.name) for field in fields(Inputs)}
    own = inputs.teacher_head_VD
    if own is not None and own.is_set_to(inputs.head_VD):
        values["teacher_head_VD"] = None  # the same memory: widened and read once
    if torch.is_autocast_enabled(device):
        for name in ("student_TD", "head_VD", "teacher_TD", "teacher_head_VD"):
            if values[name] is not None:
                values[name] = values[name].to(torch.get_autocast_dtype(device))
    dtype = statistics_dtype(values["student_TD"])
    for name, value in values.items():
        if value is not None and name not in ("student_TD", "head_VD", "bias_V"):
            values[name] = value.detach()
            if name.endswith("_T"):
                values[name] = values[name].to(torch.int64 if name == "target_T" else dtype)
    if unit_divergence:
        values["divergence_weight_T"] = torch.ones_like(values["target_T"], dtype=dtype)
    return Inputs(**values)


def _keep(inputs: Inputs, mask_T: Tensor | None) -> tuple[Inputs, Tensor | None]:
    """The rows that count, and their indices; (all, None) when every row does."""
    if mask_T is None:
        return inputs, None
    rows_T = mask_T.nonzero()[:, 0]
    if rows_T.shape[0] == mask_T.shape[0]:
        return inputs, None
    values = {field.name: getattr(inputs, field.name) for field in fields(Inputs)}
    by_row = ("_TD", "_T")
    for name, value in values.items():
        if value is not None and name.endswith(by_row):
            values[name] = value.index_select(0, rows_T)
    return Inputs(**values), rows_T


def _spread(found: RowStatistics, rows_T: Tensor | None, total: int) -> dict[str, Any]:
    """Statistics back at their rows among all; 0 elsewhere."""
    values = {field.name: getattr(found, field.name) for field in fields(RowStatistics)}
    if rows_T is None:
        return values
    return {
        name: None if x is None else x.new_zeros(total).index_copy_(0, rows_T, x)
        for name, x in values.items()
    }
