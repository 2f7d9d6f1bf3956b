"""Row mathematics of the loss head in plain torch, value and explicit gradient together.

Everything is a function of log-probabilities, so that both sides being equal gives exactly zero:
the gap of two equal rows is 0.0 and every divergence and gradient is a multiple of it.

For categorical rows S = exp(l_s), T = exp(l_t) with entries k_j, D = sum_j k_j, the gradient in
the student's logits is G = F - p_s sum(F), F_j = dk_j / dl_s_j:

    forward_kl  KL(T||S)                   k = -p_t gap          F = -p_t
    reverse_kl  KL(S||T)                   k = p_s gap           F = p_s (gap + 1)
    jsd  beta KL(T||m) + (1-beta) KL(S||m) l_m - l_s = r         F = -(1-beta) p_s r
         m = (1-beta) S + beta T           r = log1p(beta expm1(-gap))

An entry held at `clip` has F = 0. Shape suffixes: T rows, V vocabulary, K buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import LOG_RATIO_LIMIT, Options

# Below this gap the student's probability is under e^-80 of the teacher's: its terms vanish.
_SMALLEST_GAP = -80.0


@dataclass
class Divergence:
    """Value per row, gradient in bucket logits (None when not wanted), entries held at the clip."""

    value_T: Tensor
    gradient_TK: Tensor | None
    clipped_T: Tensor | None = None


def bucket_divergence(
    l_s_TK: Tensor, p_s_TK: Tensor, l_t_TK: Tensor, options: Options, gradient: bool
) -> Divergence:
    """D(S, T) over any categorical rows: the vocabulary, or top-k buckets."""
    kind = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}[options.divergence]
    return kind(l_s_TK, p_s_TK, l_t_TK, options, gradient)


def _forward_kl(l_s, p_s, l_t, options: Options, gradient: bool) -> Divergence:
    p_t = l_t.exp()
    entries = torch.sub(l_t, l_s).mul_(p_t)
    if options.entry_clip is None:
        return Divergence(entries.sum(-1), p_s - p_t if gradient else None)
    held = entries > options.entry_clip
    value = entries.clamp_(max=options.entry_clip).sum(-1)
    result = Divergence(value, None, held.sum(-1))
    if gradient:
        kept = 1 - (p_t * held).sum(-1, True)
        result.gradient_TK = (p_s * kept).sub_(p_t.masked_fill_(held, 0))
    return result


def _reverse_kl(l_s, p_s, l_t, options: Options, gradient: bool) -> Divergence:
    gap = l_s - l_t
    entries = p_s * gap
    if options.entry_clip is None:
        value = entries.sum(-1)
        return Divergence(value, gap.sub_(value[:, None]).mul_(p_s) if gradient else None)
    held = entries > options.entry_clip
    result = Divergence(entries.clamp(max=options.entry_clip).sum(-1), None, held.sum(-1))
    if gradient:
        kept = entries.masked_fill_(held, 0).sum(-1, True) - (p_s * held).sum(-1, True)
        result.gradient_TK = gap.masked_fill_(held, 0).sub_(held.to(gap.dtype)).sub_(kept).mul_(p_s)
    return result


def _jsd(l_s, p_s, l_t, options: Options, gradient: bool) -> Divergence:
    beta = options.beta
    gap = (l_s - l_t).clamp_(min=_SMALLEST_GAP)
    r = torch.expm1(-gap).mul_(beta).log1p_()
    towards_s = (p_s * r).mul_(beta - 1)
    entries = gap.add_(r).mul_(l_t.exp()).mul_(-beta).add_(towards_s)
    if options.entry_clip is None:
        result = Divergence(entries.sum(-1), None)
    else:
        held = entries > options.entry_clip
        result = Divergence(entries.clamp(max=options.entry_clip).sum(-1), None, held.sum(-1))
        towards_s.masked_fill_(held, 0)
    if gradient:
        result.gradient_TK = towards_s.sub_(p_s * towards_s.sum(-1, True))
    return result


def vocabulary_divergence(
    l_s_TV: Tensor, p_s_TV: Tensor, l_t_TV: Tensor, options: Options, gradient: bool
) -> Divergence:
    """D and its gradient in all V student logits; top-k buckets are spread back."""
    if options.top_k is None:
        return bucket_divergence(l_s_TV, p_s_TV, l_t_TV, options, gradient)
    a_TK, index_TK = l_s_TV.topk(options.top_k, -1)
    b_TK = l_t_TV.gather(1, index_TK)
    if not options.tail:
        a_TK, b_TK = a_TK.log_softmax(-1), b_TK.log_softmax(-1)
        found = bucket_divergence(a_TK, a_TK.exp(), b_TK, options, gradient)
        if gradient:
            spread_TV = torch.zeros_like(l_s_TV)
            found.gradient_TK = spread_TV.scatter_(1, index_TK, found.gradient_TK)
        return found
    rest_s_T1 = _log_rest(l_s_TV, index_TK)
    a_TK = torch.cat([a_TK, rest_s_T1], -1)
    b_TK = torch.cat([b_TK, _log_rest(l_t_TV, index_TK)], -1)
    found = bucket_divergence(a_TK, a_TK.exp(), b_TK, options, gradient)
    if gradient:
        # The tail's gradient goes to its members by their share of the tail.
        share_TV = (l_s_TV - rest_s_T1).clamp_(max=0).exp_()
        spread_TV = share_TV.mul_(found.gradient_TK[:, -1:])
        found.gradient_TK = spread_TV.scatter_(1, index_TK, found.gradient_TK[:, :-1])
    return found


def _log_rest(l_TV: Tensor, index_TK: Tensor) -> Tensor:
    """log of the mass outside index_TK: log(-expm1(logsumexp(picked))) without cancellation."""
    return l_TV.scatter(1, index_TK, -torch.inf).logsumexp(-1, True)


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


def row_tile(
    logits: list[Tensor], rows: dict[str, Tensor | None], options: Options, gradient: bool
) -> dict[str, Tensor]:
    """Loss and statistics by row, from the [T, V] products h W^T + b of one tile.

    `logits` (the student's, then the teacher's if there is one) is overwritten; with `gradient`
    the student's becomes the gradient of the summed loss in its own entries.
    """
    slope_TV = _scale_(logits[0], options, gradient)
    l_s_TV = torch.log_softmax(logits[0], -1, out=logits[0])
    p_s_TV = l_s_TV.exp()
    target_T1 = rows["target_T"][:, None]
    logprob_T = l_s_TV.gather(1, target_T1)[:, 0]
    entropy_T = -(p_s_TV * l_s_TV).sum(-1)
    found = {"student_logprob_T": logprob_T, "entropy_T": entropy_T}
    loss_T = torch.zeros_like(logprob_T)
    pull_T = None  # dloss / dlog p_S(y_t)
    g_TV = None
    if len(logits) == 2:
        _scale_(logits[1], options, False)
        l_t_TV = torch.log_softmax(logits[1], -1, out=logits[1])
        found["teacher_logprob_T"] = l_t_TV.gather(1, target_T1)[:, 0]
        weight_T = rows["divergence_weight_T"]
        if options.divergence == "sampled_token":
            found["divergence_T"] = logprob_T - found["teacher_logprob_T"]
            if weight_T is not None:
                pull_T = weight_T * found["divergence_T"]
                loss_T += pull_T * logprob_T
        else:
            divergence = vocabulary_divergence(l_s_TV, p_s_TV, l_t_TV, options, gradient)
            found["divergence_T"] = divergence.value_T
            if divergence.clipped_T is not None:
                found["entry_clipped_T"] = divergence.clipped_T
            if weight_T is not None:
                loss_T += weight_T * divergence.value_T
                if gradient:
                    g_TV = divergence.gradient_TK.mul_(weight_T[:, None])
    if rows["policy_weight_T"] is not None:
        terms = policy_terms(
            logprob_T, rows["policy_weight_T"], rows["old_logprob_T"], options.clip
        )
        loss_T += terms[0]
        pull_T = terms[1] if pull_T is None else pull_T + terms[1]
        if terms[2] is not None:
            found["policy_clipped_T"] = terms[2]
    bonus_T = rows["entropy_weight_T"]
    if bonus_T is not None:
        loss_T -= bonus_T * entropy_T
    if gradient:
        if bonus_T is not None:
            bonus_TV = (l_s_TV + entropy_T[:, None]).mul_(p_s_TV).mul_(bonus_T[:, None])
            g_TV = bonus_TV if g_TV is None else g_TV.add_(bonus_TV)
        if pull_T is not None:
            pull_TV = p_s_TV.mul_(-pull_T[:, None]).scatter_add_(1, target_T1, pull_T[:, None])
            g_TV = pull_TV if g_TV is None else g_TV.add_(pull_TV)
        if slope_TV is not None:
            g_TV.mul_(slope_TV)
        if options.logit_scale != options.temperature:
            g_TV.mul_(options.logit_scale / options.temperature)
        logits[0].copy_(g_TV)
    found["loss_T"] = loss_T
    return found


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
