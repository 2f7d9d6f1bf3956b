"""Row mathematics on one shard of the vocabulary: three passes with a merge after the first two.

    1  per stream m = max z and S = sum e^(z - m), z[y] where y is here; the shard's best k
    2  with the merged m and S: the shard's parts of H, of D and of sum(F) below
    3  the gradient in the shard's logits

With l = z - m - log S, gap = l_s - l_t and D = sum_j k_j, the gradient of D in the student's logits
is F_j - p_s_j sum(F), where F = dk / dl_s may be shifted by any multiple of p_s:

    forward_kl  KL(T||S)                   k = -p_t gap                         F = -p_t
    reverse_kl  KL(S||T)                   k = p_s gap                          F = p_s gap
    jsd  beta KL(T||m) + (1-beta) KL(S||m) k = -beta p_t (gap + r) - (1-beta) p_s r
         m = (1-beta) S + beta T           r = log1p(beta expm1(-gap))          F = -(1-beta) p_s r

All are multiples of the gap or become p_s - p_t, so equal streams give exactly 0 and no divergence
is the difference of two log-normalisers. An entry held at entry_clip has dk = 0 (for reverse_kl,
whose unshifted F is p_s (gap + 1), its p_s is taken out).
Shape suffixes: T rows of a tile, V vocabulary entries of the shard, K candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Options
from .softmax import Columns, Softmax, add_up, exponentials
from .top_k import Buckets, Selection, best, bucket_divergence_of, rest_sums, select, spread_

# Below this gap the student's probability is under e^-80 of the teacher's: its terms vanish.
_SMALLEST_GAP = -80.0


class Shard(NamedTuple):
    """Vocabulary entries [start, start + size) on rank `rank`."""

    rank: int
    start: int
    size: int

    def columns(self, target_T: Tensor) -> tuple[Tensor, Tensor]:
        """Where each target is in the shard, [T, 1], and whether it is; 0 and False if not."""
        column_T = target_T - self.start
        here_T = (column_T >= 0) & (column_T < self.size)
        return (column_T * here_T)[:, None], here_T


class Merged(NamedTuple):
    """After the first merge: what a row's softmax and its target need of the whole vocabulary."""

    student: Softmax
    logprob_T: Tensor
    teacher: Softmax | None = None
    teacher_logprob_T: Tensor | None = None
    selection: Selection | None = None


class Divergence(NamedTuple):
    """After the second: D, sum(F) or the gradient in top-k buckets, entries held at the clip."""

    value_T: Tensor
    slope_T: Tensor | None = None
    clipped_T: Tensor | None = None
    buckets: Buckets | None = None


class Terms(NamedTuple):
    """dloss / d(D, log p_S(y), -H) by row, None for terms that are not there, and the rest that
    the gradient needs."""

    target_T: Tensor
    merged: Merged
    divergence: Divergence | None
    entropy_T: Tensor
    weight_T: Tensor | None
    pull_T: Tensor | None
    bonus_T: Tensor | None


def scale_(z_TV: Tensor, options: Options) -> None:
    """logit_scale, softcap, 1/temperature in place."""
    if options.softcap is not None:
        z_TV.mul_(options.logit_scale / options.softcap).tanh_()
        z_TV.mul_(options.softcap / options.temperature)
    elif options.logit_scale != options.temperature:
        z_TV.mul_(options.logit_scale / options.temperature)


def first_sums(
    logits: list[Tensor], target_T: Tensor, shard: Shard, options: Options, spare: list[Tensor]
) -> tuple[Columns, Tensor | None]:
    """Pass 1: what the shard sends, and with top_k the columns of its candidates."""
    column_T1, here_T = shard.columns(target_T)
    found = {}
    for stream, z_TV in zip(("student", "teacher"), logits, strict=False):
        found |= exponentials(stream, z_TV, spare[0])
        found[f"{stream} picked"] = z_TV.gather(1, column_T1)[:, 0] * here_T
    if options.top_k is None or len(logits) == 1:
        return found, None
    candidates, column_TK = best(logits[0], logits[1], options.top_k)
    return found | candidates, column_TK


def merge_first(parts: Columns, column_TK: Tensor | None, shard: Shard) -> Merged:
    """From all ranks' `first_sums`, [R, T] and [R, T, K]; the same bits on every rank."""
    student, logprob_T = _merged_stream(parts, "student")
    if "teacher most" not in parts:
        return Merged(student, logprob_T)
    teacher, teacher_logprob_T = _merged_stream(parts, "teacher")
    selection = None
    if column_TK is not None:
        selection = select(parts, column_TK, shard.rank, student, teacher)
    return Merged(student, logprob_T, teacher, teacher_logprob_T, selection)


def _merged_stream(parts: Columns, stream: str) -> tuple[Softmax, Tensor]:
    softmax = Softmax.merged(parts, stream)
    picked_T1 = add_up(parts[f"{stream} picked"])[:, None]
    return softmax, softmax.log_probabilities(picked_T1)[:, 0]


def second_sums(
    logits: list[Tensor], merged: Merged, options: Options, gradient: bool, spare: list[Tensor]
) -> Columns:
    """Pass 2: what the shard sends. F of a full-vocabulary divergence is left in logits[1]."""
    l_s_TV = merged.student.log_probabilities(logits[0], spare[0])
    p_s_TV = merged.student.probabilities(logits[0], spare[1])
    found = {"entropy": -torch.mul(p_s_TV, l_s_TV, out=spare[2]).sum(-1)}
    if merged.teacher is None or options.divergence == "sampled_token":
        return found
    if merged.selection is not None:
        return found | (rest_sums(logits, merged.selection, spare) if options.tail else {})
    p_t_TV = merged.teacher.probabilities(logits[1], spare[2])
    l_t_TV = merged.teacher.log_probabilities(logits[1], logits[1])
    return found | _divergence_sums(l_s_TV, p_s_TV, l_t_TV, p_t_TV, options, gradient)


def _divergence_sums(l_s, p_s, l_t, p_t, options: Options, gradient: bool) -> Columns:
    """The shard's parts of D and sum(F); writes F over l_t, and works in the other tiles."""
    clip, beta = options.entry_clip, options.beta
    if options.divergence == "forward_kl":
        entries = torch.mul(l_t.sub_(l_s), p_t, out=l_s)
        slope = torch.neg(p_t, out=l_t)
    elif options.divergence == "reverse_kl":
        entries = slope = torch.sub(l_s, l_t, out=l_t).mul_(p_s)
    else:
        gap = torch.sub(l_s, l_t, out=l_t).clamp_(min=_SMALLEST_GAP)
        r = torch.neg(gap, out=l_s).expm1_().mul_(beta).log1p_()
        towards_t = p_t.mul_(gap.add_(r)).mul_(-beta)
        slope = torch.mul(r, p_s, out=l_t).mul_(beta - 1)
        entries = towards_t.add_(slope)
    if clip is None:
        found = {"divergence": entries.sum(-1)}
    else:
        held = entries > clip
        found = {"divergence": entries.clamp(max=clip).sum(-1)}
        found["clipped"] = held.sum(-1).to(entries.dtype)
        slope.masked_fill_(held, 0)
        if options.divergence == "reverse_kl":
            slope.sub_(p_s.mul_(held))
    # sum(F) of forward_kl is -1 by definition, plus what the clip holds: p_s - p_t stays exact.
    if gradient and options.divergence != "forward_kl":
        found["slope"] = slope.sum(-1)
    elif gradient and clip is not None:
        found["slope"] = p_t.mul_(held).sum(-1)
    return found


def merge_second(
    parts: Columns, merged: Merged, options: Options, gradient: bool
) -> Divergence | None:
    """From all ranks' `second_sums`, [R, T]; None without a teacher."""
    if merged.teacher is None or merged.teacher_logprob_T is None:
        return None
    if options.divergence == "sampled_token":
        return Divergence(merged.logprob_T - merged.teacher_logprob_T)
    if merged.selection is not None:
        streams = merged.student, merged.teacher
        found, buckets = bucket_divergence_of(merged.selection, parts, streams, options, gradient)
        return Divergence(found.value_T, None, found.clipped_T, buckets)
    sums = {name: add_up(part_RT) for name, part_RT in parts.items()}
    slope_T = sums.get("slope")
    if gradient and options.divergence == "forward_kl":
        one_T = torch.ones_like(sums["divergence"])
        slope_T = -one_T if slope_T is None else slope_T - one_T
    return Divergence(sums["divergence"], slope_T, sums.get("clipped"))


def write_gradient(
    logits: list[Tensor], terms: Terms, shard: Shard, options: Options, spare: list[Tensor]
) -> None:
    """Pass 3: dloss / d(h W^T + b) over the student's logits, from F in the teacher's."""
    z_TV, student = logits[0], terms.merged.student
    p_s_TV = student.probabilities(z_TV, spare[0])
    bonus_TV = curve_TV = None
    if terms.bonus_T is not None:
        bonus_TV = student.log_probabilities(z_TV, spare[1]).add_(terms.entropy_T[:, None])
        bonus_TV.mul_(p_s_TV).mul_(terms.bonus_T[:, None])
    if options.softcap is not None:
        ratio = options.temperature / options.softcap
        curve_TV = torch.mul(z_TV, ratio, out=spare[2]).square_().neg_().add_(1)
    g_TV = _divergence_gradient(logits, p_s_TV, terms)
    if bonus_TV is not None:
        g_TV.add_(bonus_TV)
    if terms.pull_T is not None:
        column_T1, here_T = shard.columns(terms.target_T)
        g_TV.addcmul_(p_s_TV, terms.pull_T[:, None], value=-1)
        g_TV.scatter_add_(1, column_T1, (terms.pull_T * here_T)[:, None])
    if curve_TV is not None:
        g_TV.mul_(curve_TV)
    if options.logit_scale != options.temperature:
        g_TV.mul_(options.logit_scale / options.temperature)


def _divergence_gradient(logits: list[Tensor], p_s_TV: Tensor, terms: Terms) -> Tensor:
    """w_div dD/dz over the student's logits; zeros where D has no gradient of its own."""
    out_TV, divergence, merged = logits[0], terms.divergence, terms.merged
    if divergence is None or terms.weight_T is None:
        return out_TV.zero_()
    if divergence.buckets is not None and merged.selection is not None:
        spread_(out_TV, merged.student, merged.selection, divergence.buckets)
    elif divergence.slope_T is not None:
        slope_T1 = divergence.slope_T[:, None]
        torch.addcmul(logits[1], p_s_TV, slope_T1, value=-1, out=out_TV)
    else:
        return out_TV.zero_()  # sampled_token: all in the pull on log p_S(y)
    return out_TV.mul_(terms.weight_T[:, None])
