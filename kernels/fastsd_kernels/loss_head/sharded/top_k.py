"""Top-k divergences over a sharded vocabulary.

Every rank sends its k best logits of the student with the teacher's beside them, sees all of them
and selects the same k, so the divergence of the buckets is computed on every rank alike. Only the
mass of the rest is summed over the shards, in the second message.
Shape suffixes: R ranks, T rows, V vocabulary entries of the shard, K candidates, entries, buckets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import rows
from ..contract import Options
from .softmax import LOWEST, Columns, Softmax, exponentials


class Selection(NamedTuple):
    """The k entries that a row's divergence compares, and which of them are in this shard.

    student_TK, teacher_TK: their log-probabilities, on every rank. column_TK: this shard's
    candidates; chosen_TK: whether each is among the k; slot_TK: as which of them.
    """

    student_TK: Tensor
    teacher_TK: Tensor
    column_TK: Tensor
    chosen_TK: Tensor
    slot_TK: Tensor


class Buckets(NamedTuple):
    """The divergence's gradient in the k buckets, then in the rest's; the rest's log-mass."""

    gradient_TK: Tensor
    rest_T1: Tensor | None


def best(student_TV: Tensor, teacher_TV: Tensor, k: int) -> tuple[Columns, Tensor]:
    """The shard's candidates as every rank sends them, and their columns."""
    count = min(k, student_TV.shape[1])
    student_TK, column_TK = student_TV.topk(count, -1)
    found = {"student best": student_TK, "teacher best": teacher_TV.gather(1, column_TK)}
    # A shard of fewer than k entries fills up with some that are not selected: V > k.
    return {
        name: pad(z_TK, (0, k - count), value=LOWEST) for name, z_TK in found.items()
    }, column_TK


def select(
    parts: Columns, column_TK: Tensor, rank: int, student: Softmax, teacher: Softmax
) -> Selection:
    """The k best of all ranks' candidates. The sort is stable: ranks must break ties alike."""
    ranks, count, k = parts["student best"].shape
    student_TK, teacher_TK = (
        parts[f"{stream} best"].transpose(0, 1).reshape(count, ranks * k)
        for stream in ("student", "teacher")
    )
    best_TK = student_TK.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    slot_TK = torch.full_like(student_TK, -1, dtype=torch.int64)
    slot_TK.scatter_(1, best_TK, torch.arange(k, device=best_TK.device).expand(count, k))
    slot_TK = slot_TK[:, rank * k : rank * k + column_TK.shape[1]]
    return Selection(
        student.log_probabilities(student_TK.gather(1, best_TK)),
        teacher.log_probabilities(teacher_TK.gather(1, best_TK)),
        column_TK,
        slot_TK >= 0,
        slot_TK.clamp(min=0),
    )


def rest_sums(logits: list[Tensor], selection: Selection, spare: list[Tensor]) -> Columns:
    """m and S over the shard's entries that are not selected."""
    found = {}
    for stream, z_TV in zip(("student", "teacher"), logits, strict=True):
        z_TK = z_TV.gather(1, selection.column_TK).masked_fill_(selection.chosen_TK, -torch.inf)
        rest_TV = spare[0].copy_(z_TV).scatter_(1, selection.column_TK, z_TK)
        found |= exponentials(stream, rest_TV, spare[1])
    return found


def bucket_divergence_of(
    selection: Selection,
    parts: Columns,
    streams: tuple[Softmax, Softmax],
    options: Options,
    gradient: bool,
) -> tuple[rows.Divergence, Buckets | None]:
    """D of the buckets and its gradient in them; `parts` are all ranks' `rest_sums`."""
    a_TK, b_TK = selection.student_TK, selection.teacher_TK
    rest_T1 = None
    if options.tail:
        rest_T1, teacher_rest_T1 = (
            softmax.log_probabilities(outside.most_T1).add_(outside.total_T1.log())
            for softmax, outside in zip(
                streams, (Softmax.merged(parts, x) for x in ("student", "teacher")), strict=True
            )
        )
        a_TK, b_TK = torch.cat([a_TK, rest_T1], -1), torch.cat([b_TK, teacher_rest_T1], -1)
    else:
        a_TK, b_TK = a_TK.log_softmax(-1), b_TK.log_softmax(-1)
    spare = b_TK.exp(), torch.empty_like(a_TK)
    found = rows.bucket_divergence(a_TK, a_TK.exp(), b_TK, options, gradient, spare)
    buckets = None if found.gradient_TK is None else Buckets(found.gradient_TK, rest_T1)
    return found, buckets


def spread_(z_TV: Tensor, student: Softmax, selection: Selection, buckets: Buckets) -> None:
    """The buckets' gradient in the shard's logits, in place; the rest's by each entry's share."""
    g_TK = buckets.gradient_TK
    if buckets.rest_T1 is None:
        z_TV.zero_()
    else:
        student.log_probabilities(z_TV, z_TV).sub_(buckets.rest_T1).exp_().mul_(g_TK[:, -1:])
    other_TK = z_TV.gather(1, selection.column_TK)
    own_TK = g_TK.gather(1, selection.slot_TK)
    z_TV.scatter_(1, selection.column_TK, torch.where(selection.chosen_TK, own_TK, other_TK))
