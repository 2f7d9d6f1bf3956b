"""Row mathematics of the loss head in plain torch, value and explicit gradient together.

Everything is a function of log-probabilities, so that both sides being equal gives exactly zero:
the gap of two equal rows is 0.0 and every divergence and gradient is a multiple of it.

For categorical rows S = exp(l_s), T = exp(l_t), gap = l_s - l_t, with entries k_j, D = sum_j k_j,
the gradient in the student's logits is G = F - p_s sum(F), F_j = dk_j / dl_s_j:

    forward_kl  KL(T||S)                   k = -p_t gap          F = -p_t
    reverse_kl  KL(S||T)                   k = p_s gap           F = p_s (gap + 1)
    jsd  beta KL(T||m) + (1-beta) KL(S||m) l_m - l_s = r         F = -(1-beta) p_s r
         m = (1-beta) S + beta T           r = log1p(beta expm1(-gap))

An entry held at entry_clip has F = 0. Probabilities come from softmax where the logits are at hand:
exp(l) would carry the rounding of l, twice the error of the whole softmax. A tile is worked on in
place and in two spare tiles: fresh memory for each product would cost more than the arithmetic.
Shape suffixes: T rows, V vocabulary, K buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import LOG_RATIO_LIMIT, Options

# Below this gap the student's probability is under e^-80 of the teacher's: its terms vanish.
_SMALLEST_GAP = -80.0

Spare = tuple[Tensor, Tensor]


@dataclass
class Divergence:
    """Value per row, gradient in bucket logits (None when not wanted), entries held at the clip."""

    value_T: Tensor
    gradient_TK: Tensor | None
    clipped_T: Tensor | None = None


def bucket_divergence(
    l_s_TK: Tensor, p_s_TK: Tensor, l_t_TK: Tensor, options: Options, gradient: bool, spare: Spare
) -> Divergence:
    """D(S, T) over any categorical rows: the vocabulary, or top-k buckets.

    spare[0] holds p_t = exp(l_t) unless `needs_teacher_probabilities` is false. Overwrites l_t_TK.
    """
    kind = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}[options.divergence]
    return kind(l_s_TK, p_s_TK, l_t_TK, options, gradient, spare)


def needs_teacher_probabilities(options: Options) -> bool:
    return options.divergence in ("forward_kl", "jsd")


def _forward_kl(l_s, p_s, l_t, options: Options, gradient: bool, spare: Spare) -> Divergence:
    p_t = spare[0]
    entries = l_t.sub_(l_s).mul_(p_t)
    result, held = _sum_entries(entries, options.entry_clip)
    if not gradient:
        return result
    if held is None:
        result.gradient_TK = torch.sub(p_s, p_t, out=p_t)
    else:
        kept = 1 - (p_t * held).sum(-1, True)
        result.gradient_TK = torch.mul(p_s, kept, out=l_t).sub_(p_t.masked_fill_(held, 0))
    return result


def _reverse_kl(l_s, p_s, l_t, options: Options, gradient: bool, spare: Spare) -> Divergence:
    gap = torch.sub(l_s, l_t, out=l_t)
    entries = torch.mul(p_s, gap, out=spare[0])
    result, held = _sum_entries(entries, options.entry_clip)
    if not gradient:
        return result
    if held is None:
        result.gradient_TK = gap.sub_(result.value_T[:, None]).mul_(p_s)
    else:
        # p_s (gap + 1) on entries not held, less its sum; the ones cancel except where held.
        total = entries.masked_fill_(held, 0).sum(-1, True) - (p_s * held).sum(-1, True)
        gap.masked_fill_(held, 0).sub_(held.to(gap.dtype)).sub_(total)
        result.gradient_TK = gap.mul_(p_s)
    return result


def _jsd(l_s, p_s, l_t, options: Options, gradient: bool, spare: Spare) -> Divergence:
    beta = options.beta
    p_t = spare[0]
    gap = torch.sub(l_s, l_t, out=l_t).clamp_(min=_SMALLEST_GAP)
    r = torch.neg(gap, out=spare[1]).expm1_().mul_(beta).log1p_()
    towards_t = gap.add_(r).mul_(p_t).mul_(-beta)
    towards_s = r.mul_(p_s).mul_(beta - 1)
    result, held = _sum_entries(towards_t.add_(towards_s), options.entry_clip)
    if gradient:
        slope = towards_s if held is None else towards_s.masked_fill_(held, 0)
        result.gradient_TK = slope.sub_(torch.mul(p_s, slope.sum(-1, True), out=spare[0]))
    return result


def _sum_entries(entries_TK: Tensor, clip: float | None) -> tuple[Divergence, Tensor | None]:
    """D, and which entries the clip holds (None without one)."""
    if clip is None:
        return Divergence(entries_TK.sum(-1), None), None
    held = entries_TK > clip
    return Divergence(entries_TK.clamp(max=clip).sum(-1), None, held.sum(-1)), held


def vocabulary_divergence(
    l_s_TV: Tensor, p_s_TV: Tensor, l_t_TV: Tensor, options: Options, gradient: bool, spare: Spare
) -> Divergence:
    """D and its gradient in all V student logits; top-k buckets are spread back.

    spare[0] as in `bucket_divergence` without top_k; l_t_TV and `spare` are overwritten.
    """
    if options.top_k is None:
        return bucket_divergence(l_s_TV, p_s_TV, l_t_TV, options, gradient, spare)
    a_TK, index_TK = l_s_TV.topk(options.top_k, -1)
    b_TK = l_t_TV.gather(1, index_TK)
    rest_s_T1 = None
    if options.tail:
        rest_s_T1 = _log_rest_(spare[0].copy_(l_s_TV), index_TK)
        a_TK = torch.cat([a_TK, rest_s_T1], -1)
        b_TK = torch.cat([b_TK, _log_rest_(l_t_TV, index_TK)], -1)
    else:
        a_TK, b_TK = a_TK.log_softmax(-1), b_TK.log_softmax(-1)
    few = b_TK.exp(), torch.empty_like(a_TK)
    found = bucket_divergence(a_TK, a_TK.exp(), b_TK, options, gradient, few)
    if found.gradient_TK is not None:
        g_TK, spread_TV = found.gradient_TK, spare[0]
        if rest_s_T1 is None:
            spread_TV.zero_()
        else:
            # The tail's gradient goes to its members by their share; the k are written over.
            torch.sub(l_s_TV, rest_s_T1, out=spread_TV).exp_().mul_(g_TK[:, -1:])
        found.gradient_TK = spread_TV.scatter_(1, index_TK, g_TK[:, : options.top_k])
    return found


def _log_rest_(l_TV: Tensor, index_TK: Tensor) -> Tensor:
    """log of the mass outside index_TK: log(-expm1(logsumexp(picked))) without cancellation."""
    return l_TV.scatter_(1, index_TK, -torch.inf).logsumexp(-1, True)


def policy_terms(
    logprob_T: Tensor, weight_T: Tensor, old_logprob_T: Tensor | None, clip: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """P_t, dP_t / dlog p_S(y_t), and where the PPO clip holds the gradient back."""
    if old_logprob_T is None:
        return -weight_T * logprob_T, -weight_T, None
    log_ratio_T = logprob_T - old_logprob_T
    ratio_T = log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain_T = ratio_T * weight_T
    slope_T = -plain_T * (log_ratio_T.abs() <= LOG_RATIO_LIMIT)
    if clip is None:
        return -plain_T, slope_T, None
    limited_T = ratio_T.clamp(1 - clip, 1 + clip) * weight_T
    clipped_T = limited_T < plain_T
    return -torch.minimum(plain_T, limited_T), slope_T.masked_fill(clipped_T, 0), clipped_T
