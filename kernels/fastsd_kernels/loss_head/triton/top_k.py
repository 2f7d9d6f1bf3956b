"""top_k on the logits scratch: D over the student's k likeliest entries, and its sparse gradient.

The k largest logits come from torch.topk; their [T, K] buckets are worked on in plain torch, by
the row mathematics that all implementations share (rows.py). With `tail` the mass of the others is
summed by the row kernel with the k entries taken out (-inf stands for no entry), so it does not
cancel. Entries outside the k have one gradient by their share of the tail; the k get theirs
written over the dense result.
Shape suffixes: T rows, V vocabulary, K the k entries (and the tail), 9 row sums, E entry sums,
C coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ..contract import Inputs, Options
from ..rows import Divergence, bucket_divergence
from .scratch import Scratch, logit_factors, row_sums
from .sums import STUDENT_MASS, STUDENT_MOST, TEACHER_MASS, TEACHER_MOST


@dataclass(frozen=True)
class TopK:
    """The k entries of some rows: where, their scaled logits, and D with its gradient by bucket."""

    index_TK: Tensor
    z_TK: Tensor
    divergence: Divergence
    entries_TE: Tensor


def top_k(
    scratch: Scratch, target_T: Tensor, options: Options, sums_T9: Tensor, gradient: bool
) -> TopK:
    """Picks the entries and computes D. With `tail` they are -inf in the scratch afterwards.

    The scratch must carry its bias in the products (bias_V None).
    """
    assert options.top_k is not None and scratch.teacher_TV is not None
    index_TK = scratch.student_TV.topk(options.top_k, -1).indices
    z_s_TK = _scaled(scratch.student_TV.gather(1, index_TK), options)
    z_t_TK = _scaled(scratch.teacher_TV.gather(1, index_TK), options)
    entries_TE = sums_T9.new_zeros(sums_T9.shape[0], 5)
    if options.tail:
        rest_T9 = torch.empty_like(sums_T9)
        for x_TV in (scratch.student_TV, scratch.teacher_TV):
            x_TV.scatter_(1, index_TK, -torch.inf)
        row_sums(scratch, target_T, options, rest_T9)
        l_s_TK = _log_probabilities(z_s_TK, sums_T9, rest_T9, STUDENT_MOST, STUDENT_MASS)
        l_t_TK = _log_probabilities(z_t_TK, sums_T9, rest_T9, TEACHER_MOST, TEACHER_MASS)
    else:
        l_s_TK, l_t_TK = z_s_TK.log_softmax(-1), z_t_TK.log_softmax(-1)
    few = l_t_TK.exp(), torch.empty_like(l_s_TK)
    found = bucket_divergence(l_s_TK, l_s_TK.exp(), l_t_TK, options, gradient, few)
    entries_TE[:, 0] = found.value_T
    if found.clipped_T is not None:
        entries_TE[:, 2] = found.clipped_T
    if options.tail and found.gradient_TK is not None:
        entries_TE[:, 3] = rest_T9[:, STUDENT_MOST.value]
        entries_TE[:, 4] = found.gradient_TK[:, -1] / rest_T9[:, STUDENT_MASS.value]
    return TopK(index_TK, z_s_TK, found, entries_TE)


def write_gradient(
    found: TopK, rows: Inputs, options: Options, coefficients_TC: Tensor, gradient_TV: Tensor
) -> None:
    """gradient_TV at the k entries <- dloss / d(h W^T + b), all terms of the loss."""
    c = coefficients_TC[:, :, None]
    z_TK, index_TK = found.z_TK, found.index_TK
    p_TK = (z_TK - c[:, 0]).exp() * c[:, 1]
    g_TK = torch.zeros_like(z_TK)
    if rows.divergence_weight_T is not None and found.divergence.gradient_TK is not None:
        buckets_TK = found.divergence.gradient_TK[:, : z_TK.shape[1]]
        g_TK = g_TK + buckets_TK * rows.divergence_weight_T[:, None]
    if rows.entropy_weight_T is not None:
        l_TK = (z_TK - c[:, 0]) - c[:, 2]
        g_TK = g_TK + p_TK * ((l_TK + c[:, 10]) * c[:, 9])
    if rows.policy_weight_T is not None:
        hit_TK = (index_TK == rows.target_T[:, None]).to(z_TK.dtype)
        g_TK = g_TK + (hit_TK - p_TK) * c[:, 8]
    if options.softcap is not None:
        capped_TK = z_TK / logit_factors(options)[1]
        g_TK = g_TK * (1 - capped_TK * capped_TK)
    g_TK = g_TK * (options.logit_scale / options.temperature)
    gradient_TV.scatter_(1, index_TK, g_TK.to(gradient_TV.dtype))


def _scaled(x_TK: Tensor, options: Options) -> Tensor:
    inner, outer = logit_factors(options)
    z_TK = x_TK * inner
    return z_TK if options.softcap is None else z_TK.tanh() * outer


def _log_probabilities(
    z_TK: Tensor, all_T9: Tensor, rest_T9: Tensor, most: tl.constexpr, mass: tl.constexpr
) -> Tensor:
    """log p of the k entries and of all others together, from m and S of all and of the others.

    most, mass: their columns, of the student or of the teacher.
    """
    most_T1, mass_T1 = all_T9[:, most.value, None], all_T9[:, mass.value, None]
    rest_most_T1, rest_mass_T1 = rest_T9[:, most.value, None], rest_T9[:, mass.value, None]
    rest_T1 = (rest_most_T1 - most_T1) + (rest_mass_T1 / mass_T1).log()
    return torch.cat([(z_TK - most_T1) - mass_T1.log(), rest_T1], -1)
