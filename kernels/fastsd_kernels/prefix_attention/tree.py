"""Token trees: which tokens of a pack see which.

A pack holds the tokens of all segments one after the other, without padding. A token sees its own
segment up to itself and every segment above. Segments stand in depth-first order, so whatever lies
below a segment is one contiguous run of tokens: a slice, never a gather, and never a copy of keys.

Shapes: S segments, T tokens of the pack, P tokens of prefixes from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, init=False)
class PrefixTree:
    """A forest of segments, listed depth-first.

    One question with three rollouts is PrefixTree([128, 40, 0, 7], [None, 0, 0, 0]). Several roots
    are several questions in one pack.

    lengths: tokens per segment; zero is allowed.
    parents: per segment the index of the one above it, or None for a root. Parents come before
        their children, and what is below a segment is contiguous.
    outside: so many segments, the first ones, are prefixes computed elsewhere: the pack has no
        tokens of theirs, their keys and values are given as prefix_key_PNH and prefix_value_PNH.
    segments: [2, S] int64 on the CPU, lengths and parents (-1 for a root), as operators take them.
    """

    lengths: tuple[int, ...]
    parents: tuple[int | None, ...]
    outside: int
    segments: Tensor = field(compare=False, repr=False)

    def __init__(
        self, lengths: Sequence[int], parents: Sequence[int | None], outside: int = 0
    ) -> None:
        """Raises TypeError or ValueError naming the segment at fault."""
        _check(lengths, parents, outside)
        numbers = [-1 if parent is None else parent for parent in parents]
        with torch.inference_mode(False):  # autograd saves it, wherever the tree was built
            segments = torch.tensor([list(lengths), numbers], dtype=torch.int64, device="cpu")
        values = {
            "lengths": tuple(lengths),
            "parents": tuple(parents),
            "outside": outside,
            "segments": segments,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _check_contiguous(self)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Per segment its first token: in the pack, or in the prefixes for one from outside."""
        starts, filled = [], [0, 0]
        for index, length in enumerate(self.lengths):
            inside = index >= self.outside
            starts.append(filled[inside])
            filled[inside] += length
        return tuple(starts)

    @cached_property
    def tokens(self) -> int:
        """T, the tokens of the pack."""
        return sum(self.lengths[self.outside :])

    @cached_property
    def prefix_tokens(self) -> int:
        """P, the tokens of the prefixes from outside."""
        return sum(self.lengths[: self.outside])

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Per segment how many segments are above it."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent is None else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Per segment the position of its first token: the lengths above it, added up."""
        offsets: list[int] = []
        for parent in self.parents:
            offsets.append(0 if parent is None else offsets[parent] + self.lengths[parent])
        return tuple(offsets)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Per segment the tokens [start, stop) of the pack that are its own or below it."""
        return tuple((first, last) for first, last, _ in _runs(self))

    def keys(self, segment: int) -> tuple[int, int]:
        """The segment's own tokens [start, stop), in the pack or in the prefixes."""
        start = self.starts[segment]
        return start, start + self.lengths[segment]

    @cached_property
    def segment_of_T(self) -> Tensor:
        """[T] int64 on the CPU, the segment of each token of the pack."""
        lengths = torch.tensor(self.lengths[self.outside :], dtype=torch.int64, device="cpu")
        segments = torch.arange(self.outside, len(self.lengths), device="cpu")
        return segments.repeat_interleave(lengths)

    @cached_property
    def position_of_T(self) -> Tensor:
        """[T] int64 on the CPU, each token's distance from the start of its root: its position."""
        shift = [o - s for o, s in zip(self.offsets, self.starts, strict=True)]
        shift_S = torch.tensor(shift, dtype=torch.int64, device="cpu")
        return torch.arange(self.tokens, device="cpu") + shift_S[self.segment_of_T]


def _runs(tree: PrefixTree) -> list[tuple[int, int, int]]:
    """Per segment the tokens at and below it: first, one after the last, how many."""
    runs = [
        (start, start + length, length) if index >= tree.outside else (0, 0, 0)
        for index, (start, length) in enumerate(zip(tree.starts, tree.lengths, strict=True))
    ]
    for index in reversed(range(len(runs))):
        parent = tree.parents[index]
        if parent is not None and runs[index][2]:
            (first, last, count), (above_first, above_last, above) = runs[index], runs[parent]
            if above:
                first, last = min(first, above_first), max(last, above_last)
            runs[parent] = (first, last, count + above)
    return runs


def _check(lengths: Sequence[int], parents: Sequence[int | None], outside: int) -> None:
    if len(lengths) != len(parents):
        raise ValueError(
            f"parents: expected one per segment, {len(lengths)} of them like lengths, got "
            f"{len(parents)}"
        )
    if not _is_int(outside) or not 0 <= outside <= len(lengths):
        raise ValueError(
            f"outside: expected a number of segments from 0 to {len(lengths)}, got {outside!r}"
        )
    for index, length in enumerate(lengths):
        if not _is_int(length):
            raise TypeError(f"lengths[{index}]: expected an int, got {type(length).__name__}")
        if length < 0:
            raise ValueError(f"lengths[{index}]: expected 0 or more tokens, got {length}")
    for index, parent in enumerate(parents):
        if parent is None:
            continue
        if not _is_int(parent):
            raise TypeError(
                f"parents[{index}]: expected an int or None, got {type(parent).__name__}"
            )
        if not 0 <= parent < index:
            raise ValueError(
                f"parents[{index}]: expected an earlier segment (0 to {index - 1}) or None, got "
                f"{parent}; list parents before their children"
            )


def _check_contiguous(tree: PrefixTree) -> None:
    for index, (first, last, count) in enumerate(_runs(tree)):
        if count != last - first:
            raise ValueError(
                f"parents: what is below segment {index} is not contiguous ({count} tokens between "
                f"{first} and {last}); list the segments depth-first, each directly followed by "
                "everything below it"
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
