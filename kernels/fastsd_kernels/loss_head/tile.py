"""One tile of rows of the chunked implementation: logits in, loss and gradient out, in place.

With l = log p_S, H its entropy and c = dloss / dlog p_S(y), the summed loss's gradient in z is

    w_div dD/dz  +  c (1[j = y] - p_s)  +  w_ent p_s (l + H)

times the slope of the scaling z = softcap(logit_scale x) / temperature. Policy and sampled-token
terms differ in c only. Shape suffixes: T rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Options
from .rows import Spare, needs_teacher_probabilities, policy_terms, vocabulary_divergence


class Rows(NamedTuple):
    """Targets and weights of some rows, as in `Inputs`."""

    target_T: Tensor
    divergence_weight_T: Tensor | None
    policy_weight_T: Tensor | None
    old_logprob_T: Tensor | None
    entropy_weight_T: Tensor | None


def row_tile(
    logits: list[Tensor],
    rows: Rows,
    options: Options,
    gradient: bool,
    spare: list[Tensor],
) -> dict[str, Tensor]:
    """Loss and statistics by row, from the [T, V] products h W^T + b of one tile.

    `logits` (the student's, then the teacher's if there is one) and the three `spare` tiles are
    overwritten; with `gradient` the student's logits become the gradient in its own products.
    """
    slope_TV = _scale_(logits[0], options, gradient)
    p_s_TV = torch.softmax(logits[0], -1, out=spare[0])
    l_s_TV = torch.log_softmax(logits[0], -1, out=logits[0])
    logprob_T = l_s_TV.gather(1, rows.target_T[:, None])[:, 0]
    entropy_T = -torch.mul(p_s_TV, l_s_TV, out=spare[1]).sum(-1)
    found = {"student_logprob_T": logprob_T, "entropy_T": entropy_T}
    loss_T = torch.zeros_like(logprob_T)
    pull_T = divergence_TV = None
    if len(logits) == 2:
        _scale_(logits[1], options, False)
        pull_T, divergence_TV = _teacher_terms(
            l_s_TV, p_s_TV, logits[1], rows, options, gradient, (spare[1], spare[2]), found, loss_T
        )
    if rows.policy_weight_T is not None:
        policy_T, slope_T, clipped_T = policy_terms(
            logprob_T, rows.policy_weight_T, rows.old_logprob_T, options.clip
        )
        loss_T += policy_T
        pull_T = slope_T if pull_T is None else pull_T + slope_T
        if clipped_T is not None:
            found["policy_clipped_T"] = clipped_T
    if rows.entropy_weight_T is not None:
        loss_T -= rows.entropy_weight_T * entropy_T
    found["loss_T"] = loss_T
    if gradient:
        terms = _gradient_terms_(l_s_TV, p_s_TV, entropy_T, divergence_TV, pull_T, rows)
        _write_gradient(logits[0], terms, slope_TV, options)
    return found


def _teacher_terms(
    l_s_TV: Tensor,
    p_s_TV: Tensor,
    z_t_TV: Tensor,
    rows: Rows,
    options: Options,
    gradient: bool,
    spare: Spare,
    found: dict[str, Tensor],
    loss_T: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Adds to `found` and `loss_T`; returns (dloss / dlog p_S(y), w_div dD / dz) or None."""
    if options.top_k is None and needs_teacher_probabilities(options):
        torch.softmax(z_t_TV, -1, out=spare[0])
    l_t_TV = torch.log_softmax(z_t_TV, -1, out=z_t_TV)
    logprob_T = found["student_logprob_T"]
    found["teacher_logprob_T"] = l_t_TV.gather(1, rows.target_T[:, None])[:, 0]
    weight_T = rows.divergence_weight_T
    if options.divergence == "sampled_token":
        found["divergence_T"] = logprob_T - found["teacher_logprob_T"]
        if weight_T is None:
            return None, None
        pull_T = weight_T * found["divergence_T"]
        loss_T += pull_T * logprob_T
        return pull_T, None
    divergence = vocabulary_divergence(l_s_TV, p_s_TV, l_t_TV, options, gradient, spare)
    found["divergence_T"] = divergence.value_T
    if divergence.clipped_T is not None:
        found["entry_clipped_T"] = divergence.clipped_T
    if weight_T is None:
        return None, None
    loss_T += weight_T * divergence.value_T
    g_TV = divergence.gradient_TK
    return None, None if g_TV is None else g_TV.mul_(weight_T[:, None])


def _gradient_terms_(
    l_s_TV: Tensor,
    p_s_TV: Tensor,
    entropy_T: Tensor,
    divergence_TV: Tensor | None,
    pull_T: Tensor | None,
    rows: Rows,
) -> list[Tensor]:
    """The terms of the gradient in z. Overwrites l_s_TV and p_s_TV."""
    terms = []
    if rows.entropy_weight_T is not None:
        slope_TV = l_s_TV.add_(entropy_T[:, None]).mul_(p_s_TV)
        terms.append(slope_TV.mul_(rows.entropy_weight_T[:, None]))
    if divergence_TV is not None:
        terms.append(divergence_TV)
    if pull_T is not None:
        pull_T1 = pull_T[:, None]
        terms.append(p_s_TV.mul_(-pull_T1).scatter_add_(1, rows.target_T[:, None], pull_T1))
    return terms


def _write_gradient(
    out_TV: Tensor, terms: list[Tensor], slope_TV: Tensor | None, options: Options
) -> None:
    """out <- the sum of the terms, through the scaling of the logits. A term may be `out`."""
    if len(terms) == 1:
        out_TV.copy_(terms[0])
    else:
        torch.add(terms[0], terms[1], out=out_TV)
        for term_TV in terms[2:]:
            out_TV.add_(term_TV)
    if slope_TV is not None:
        out_TV.mul_(slope_TV)
    if options.logit_scale != options.temperature:
        out_TV.mul_(options.logit_scale / options.temperature)


def _scale_(z_TV: Tensor, options: Options, gradient: bool) -> Tensor | None:
    """logit_scale, softcap, 1/temperature in place; returns the softcap's derivative if wanted."""
    if options.softcap is None:
        if options.logit_scale != options.temperature:
            z_TV.mul_(options.logit_scale / options.temperature)
        return None
    z_TV.mul_(options.logit_scale / options.softcap).tanh_()
    slope_TV = 1 - z_TV * z_TV if gradient else None
    z_TV.mul_(options.softcap / options.temperature)
    return slope_TV
