"""A tree as a list of attention calls whose results, merged, are the tree's attention.

Two forms, for two kinds of kernel; in both a call's queries are disjoint runs, and no key stands
twice in a call.

- `segment_calls`: one call per segment. Its queries are the segment's own tokens and all below
  them, its keys the own tokens, its mask "key not later than query": rows of the segment see it
  causally, rows below it, which come later, see all of it. Own and prefix part are one call.
- `level_calls`: many runs in one launch, as CUDA kernels like it. Their causal mask is aligned at
  the bottom right, so own and prefix part are separate: first every segment against itself,
  causally, then per level of the tree what is below each segment against that segment, fully.

Shape suffix: T tokens of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .tree import PrefixTree

Rows = slice | Tensor
Span = tuple[int, int]


@dataclass(frozen=True)
class Packing:
    """Where the runs of a call begin, as variable-length kernels take it."""

    query_starts: Tensor  # int32, one more than runs
    key_starts: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class Call:
    """One partial attention: which rows of the pack, against which keys."""

    queries: Rows
    keys: Rows
    outside: bool  # the keys are rows of the prefixes
    causal: bool
    packing: Packing | None = None


@lru_cache(maxsize=16)
def segment_calls(tree: PrefixTree) -> tuple[Call, ...]:
    """One call per segment that has keys and somebody to see them."""
    return tuple(
        Call(slice(*tree.spans[s]), slice(*tree.keys(s)), s < tree.outside, s >= tree.outside)
        for s in range(len(tree.lengths))
        if _length(tree.keys(s)) and _length(tree.spans[s])
    )


@lru_cache(maxsize=16)
def level_calls(tree: PrefixTree, device: torch.device) -> tuple[Call, ...]:
    """All segments against themselves, then one call per level and kind of key."""
    own = [tree.keys(s) for s in range(tree.outside, len(tree.lengths)) if tree.lengths[s]]
    calls = [_packed(own, own, False, True, device)] if own else []
    levels: dict[tuple[int, bool], list[tuple[Span, Span]]] = {}
    for s, (start, stop) in enumerate(tree.spans):
        outside = s < tree.outside
        below = (start, stop) if outside else (start + tree.lengths[s], stop)
        if tree.lengths[s] and _length(below) > 0:
            runs = levels.setdefault((tree.depths[s], outside), [])
            runs.append((below, tree.keys(s)))
    for (_, outside), runs in levels.items():
        queries, keys = zip(*sorted(runs), strict=True)
        calls.append(_packed(queries, keys, outside, False, device))
    return tuple(calls)


def _packed(
    queries: Sequence[Span], keys: Sequence[Span], outside: bool, causal: bool, device: torch.device
) -> Call:
    packing = Packing(
        _starts(queries, device),
        _starts(keys, device),
        max(map(_length, queries)),
        max(map(_length, keys)),
    )
    return Call(_rows(queries, device), _rows(keys, device), outside, causal, packing)


def _starts(spans: Sequence[Span], device: torch.device) -> Tensor:
    lengths = torch.tensor([0, *map(_length, spans)], device="cpu")
    return lengths.cumsum(0).to(device, torch.int32)


def _rows(spans: Sequence[Span], device: torch.device) -> Rows:
    """One slice where the runs touch, else the rows' numbers."""
    if all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(*span, device="cpu") for span in spans]).to(device)


def _length(span: Span) -> int:
    return span[1] - span[0]
