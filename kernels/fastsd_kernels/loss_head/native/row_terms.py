"""Between the sweeps of the native loss head: row statistics -> loss, statistics, coefficients.

The gradient of the summed loss in a row's scaled logits is (csrc/gradient.h)

    g_j = p_s (everywhere + entropy l_s) + weight F_j + pull [j = y],

F the divergence's slope in log p_s; `everywhere` takes -weight sum F, which closes the softmax.
With c = dloss / dlog p_S(y) of the policy and sampled-token terms, pull = c and everywhere loses c.
Vectors of T numbers in fp64: nothing here is worth a kernel.
Shape suffixes: T rows, K buckets of a divergence, C statistics columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...native_library import COLUMNS
from ..contract import Inputs, Options, RowStatistics
from ..rows import bucket_divergence, policy_terms


@dataclass(frozen=True)
class RowTerms:
    """loss_T in fp64; coefficients in fp32, times dz/dx; None: the call has no such term."""

    loss_T: Tensor
    statistics: RowStatistics
    everywhere_T: Tensor
    pull_T: Tensor
    weight_T: Tensor | None = None
    entropy_T: Tensor | None = None
    index_TK: Tensor | None = None
    value_TK: Tensor | None = None
    tail_T: Tensor | None = None
    rest_T: Tensor | None = None


@dataclass
class _Divergence:
    """D and the sum of F by row; with top_k its gradient in the buckets instead."""

    value_T: Tensor
    slope_T: Tensor | None = None
    held_T: Tensor | None = None
    bucket_TK: Tensor | None = None
    rest_T: Tensor | None = None  # log p_S of all that is not picked; None without a tail


def row_terms(
    part: Inputs,
    options: Options,
    statistics_TC: Tensor,
    sums_T3: Tensor | None,
    top: tuple[Tensor, Tensor, Tensor] | None,
    gradient: bool,
) -> RowTerms:
    """statistics_TC, sums_T3, top: what fastsd_statistics, _divergence_sums and _top wrote."""
    row: dict[str, Tensor] = dict(zip(COLUMNS, statistics_TC.unbind(1), strict=True))
    logprob_T = row["pick_s"] - row["lse_s"]
    found: dict[str, Tensor] = {"student_logprob_T": logprob_T, "entropy_T": row["entropy"]}
    loss_T, pull_T = torch.zeros_like(logprob_T), torch.zeros_like(logprob_T)
    divergence = None
    if part.teacher_TD is not None:
        divergence = _divergence(row, options, sums_T3, top, gradient)
        found["teacher_logprob_T"] = row["pick_t"] - row["lse_t"]
        found["divergence_T"] = divergence.value_T
        if divergence.held_T is not None:
            found["entry_clipped_T"] = divergence.held_T.long()
    weight_T, bonus_T = _double(part.divergence_weight_T), _double(part.entropy_weight_T)
    if divergence is not None and weight_T is not None:
        sampled = options.divergence == "sampled_token"
        loss_T += weight_T * divergence.value_T * (logprob_T if sampled else 1)
        if sampled:
            pull_T += weight_T * divergence.value_T
    if part.policy_weight_T is not None:
        weights = part.policy_weight_T.double(), _double(part.old_logprob_T)
        policy_T, slope_T, clipped_T = policy_terms(logprob_T, *weights, options.clip)
        loss_T += policy_T
        pull_T += slope_T
        if clipped_T is not None:
            found["policy_clipped_T"] = clipped_T
    if bonus_T is not None:
        loss_T -= bonus_T * row["entropy"]
    statistics = RowStatistics(
        **{k: x.float() if x.is_floating_point() else x for k, x in found.items()}
    )
    coefficients = _coefficients(row, options, divergence, weight_T, bonus_T, pull_T, top)
    return RowTerms(loss_T, statistics, **coefficients)


def _double(x_T: Tensor | None) -> Tensor | None:
    return None if x_T is None else x_T.double()


def _coefficients(
    row: dict[str, Tensor],
    options: Options,
    divergence: _Divergence | None,
    weight_T: Tensor | None,
    bonus_T: Tensor | None,
    pull_T: Tensor,
    top: tuple[Tensor, Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    slope = options.logit_scale / options.temperature
    everywhere_T = -pull_T
    found = {"pull_T": pull_T * slope}
    if bonus_T is not None:
        everywhere_T = everywhere_T + bonus_T * row["entropy"]
        found["entropy_T"] = bonus_T * slope
    if divergence is not None and weight_T is not None:
        if divergence.slope_T is not None:
            everywhere_T = everywhere_T - weight_T * divergence.slope_T
            found["weight_T"] = weight_T * slope
        if divergence.bucket_TK is not None and top is not None:
            index_TK = top[0]
            g_TK = divergence.bucket_TK * (weight_T * slope)[:, None]
            found["value_TK"] = g_TK[:, : index_TK.shape[1]]
            found["tail_T"] = torch.zeros_like(pull_T)
            found["rest_T"] = torch.zeros_like(pull_T)
            if divergence.rest_T is not None:
                found["tail_T"], found["rest_T"] = g_TK[:, -1], divergence.rest_T
    found["everywhere_T"] = everywhere_T * slope
    plain = {name: value.float().contiguous() for name, value in found.items()}
    return {**plain, "index_TK": top[0]} if "value_TK" in plain and top else plain


def _divergence(
    row: dict[str, Tensor],
    options: Options,
    sums_T3: Tensor | None,
    top: tuple[Tensor, Tensor, Tensor] | None,
    gradient: bool,
) -> _Divergence:
    if options.divergence == "sampled_token":
        return _Divergence((row["pick_s"] - row["lse_s"]) - (row["pick_t"] - row["lse_t"]))
    if top is not None:
        return _top_divergence(row, options, top, gradient)
    if sums_T3 is not None:
        value_T, slope_T, held_T = sums_T3.unbind(1)
        if options.divergence == "forward_kl":
            slope_T = slope_T - 1
        return _Divergence(value_T, slope_T, None if options.entry_clip is None else held_T)
    value_T = row[options.divergence]
    # F is -p_t, of sum -1; or p_s gap, of sum KL(S||T).
    slope_T = -torch.ones_like(value_T) if options.divergence == "forward_kl" else value_T
    return _Divergence(value_T, slope_T)


def _top_divergence(row, options: Options, top, gradient: bool) -> _Divergence:
    _, logits_T2K, rest_T2 = top
    lse_T2 = torch.stack([row["lse_s"], row["lse_t"]], 1)
    l_T2K, rest_T2 = logits_T2K.double() - lse_T2[..., None], rest_T2 - lse_T2
    if options.tail:
        l_T2K = torch.cat([l_T2K, rest_T2[..., None]], -1)
    else:
        l_T2K = l_T2K.log_softmax(-1)
    l_s_TK, l_t_TK = (x.contiguous() for x in l_T2K.unbind(1))
    spare = l_t_TK.exp(), torch.empty_like(l_s_TK)
    found = bucket_divergence(l_s_TK, l_s_TK.exp(), l_t_TK, options, gradient, spare)
    rest_T = rest_T2[:, 0] if options.tail else None
    return _Divergence(found.value_T, None, found.clipped_T, found.gradient_TK, rest_T)
