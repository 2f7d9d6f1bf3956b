"""The numbers behind a rollout's coloured tokens, small enough to travel inside the page.

64 rollouts of 2,048 tokens under two contexts are to fit into 3 MB: some eleven bytes for a token
under a context, text and markup included. So numbers are kept on a logarithmic scale of 16 bits,
their low and high bytes apart, deflated, as text; a script unpacks a rollout when it is opened.
The solver's own numbers stand there once, whatever the number of contexts, and log T is rebuilt as
log S + A. Where a page would still be too large, `fit` takes detail away in three places: digits of
the numbers, the teacher's alternatives where |A| is small, and the colours of weak tokens in the
page as it is before the script runs.

    deflate( tokens, views: uint32 | lengths | S | H | A of each view | D of each view | JSON )

lengths are UTF-16 units; a code c is written as 2c, or -2c - 1 where it is negative, low bytes of
an array first, then high bytes; the JSON is one object per view: {token index: [text, log-prob,
text, log-prob, ...]}. The text is RFC 1924's base 85 with , . / in place of the signs of HTML: five
characters for four bytes.

T: tokens of the response.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fastsd.errors import FastsdError

if TYPE_CHECKING:
    from fastsd.evaluation.views import TokenView

# |A| from which a token takes the next stronger colour; 1 nat is a factor of 2.7.
EDGES = (0.25, 1.0, 4.0)
# Level -> element of a coloured run. Short ones: in a page of noise every other token has its own.
TAGS = {-3: "u", -2: "b", -1: "i", 1: "a", 2: "q", 3: "em"}
UNIT = 1e-3
"""Numbers much smaller than this are on a linear scale, larger ones on a logarithmic one."""
NOT_FINITE = -(2**15)
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%.()*+-;,=/?@^_`{|}~"
_IN_HTML = bytes.maketrans(b"&<>", b".,/")
PRECISIONS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Steps of the scale: the relative error of a number is half of its step."""
# What numbers, then colours may take of the room that is left; alternatives get what remains.
_NUMBERS_SHARE, _COLOURS_SHARE = 0.7, 0.6


class TokenDataError(FastsdError):
    """Views of one rollout that do not describe the same tokens."""


@dataclass(frozen=True)
class Detail:
    """How much of the numbers a page holds. step: of the logarithmic scale. floor: |A| from which
    tokens are coloured without script. alternatives: |A| from which the teacher's are kept."""

    step: float = PRECISIONS[0]
    floor: float = EDGES[0]
    alternatives: float = 0.0


class RolloutTokens:
    """One rollout's tokens: their texts and what each context's teacher made of them.

    Raises TokenDataError where the views of one rollout disagree about its tokens.
    """

    def __init__(self, views: Sequence[TokenView]):
        first = views[0]
        if any(v.spans != first.spans or v.response != first.response for v in views):
            raise TokenDataError(
                f"prompt {first.prompt_id!r}, sample {first.sample}: its views under "
                f"{', '.join(v.context for v in views)} have different tokens; measure again"
            )
        self.views = views
        self.taught = [view for view in views if view.taught]
        self.advantages = {id(v): np.asarray(v.advantage, np.float64) for v in self.taught}

    @cached_property
    def starts(self) -> list[int]:
        """[T + 1] where each token's text begins; the texts cover the whole response. Of tokens
        that write one character together, the last one has it."""
        count, end = len(self.views[0].spans), len(self.views[0].response)
        starts = np.array([0, *(start for start, _ in self.views[0].spans[1:]), end][: count + 1])
        if count == 0:
            return [end]
        return np.clip(np.maximum.accumulate(starts), 0, end).tolist()

    @cached_property
    def texts(self) -> list[str]:
        response = self.views[0].response
        return [response[a:b] for a, b in zip(self.starts, self.starts[1:], strict=False)]

    @cached_property
    def _units(self) -> np.ndarray:
        """The lengths of the layout above."""
        units = [len(text.encode("utf-16-le", "surrogatepass")) // 2 for text in self.texts]
        return np.minimum(np.array(units, np.int64), 2**15 - 1)

    @cached_property
    def _values(self) -> list[np.ndarray]:
        """The arrays of the layout above on a scale whose step is 1."""
        first, taught = self.views[0], self.taught
        values = [first.student_logprob, first.entropy, *self.advantages.values()]
        return [logarithmic(one) for one in (*values, *(view.divergence for view in taught))]

    def numbers(self, step: float) -> list[bytes]:
        """The arrays of the layout above, not yet deflated."""
        counts = np.array([len(self.texts), len(self.taught)], "<u4").tobytes()
        arrays = [self._units, *(codes(values, step) for values in self._values)]
        return [counts, *(plane for array in arrays for plane in _planes(array))]

    def alternatives(self, least: float) -> bytes:
        """The JSON of the layout above: alternatives of the tokens with |A| >= least."""
        kept = []
        for view in self.taught:
            rows = view.alternatives or [()] * len(self.texts)
            # where A is no number, they may explain why
            wanted = np.flatnonzero(~(np.abs(self.advantages[id(view)]) < least)).tolist()
            kept.append(
                {
                    at: [part for text, value in rows[at] for part in (text, _short(value))]
                    for at in wanted
                    if rows[at]
                }
            )
        return json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode(
            "utf-8", "replace"
        )

    def packed(self, detail: Detail) -> str:
        """Everything, as text."""
        return _packed([*self.numbers(detail.step), self.alternatives(detail.alternatives)])


def levels(advantage_T: Sequence[float] | np.ndarray, floor: float = EDGES[0]) -> np.ndarray:
    """int8 [T] in -3 ... 3: the colour of each token; 0 below the floor and where A is not a
    number."""
    values_T = np.asarray(advantage_T, np.float64)
    size_T = np.abs(values_T)
    level_T = np.digitize(size_T, EDGES) * np.sign(values_T)
    return np.where(np.isfinite(values_T) & (size_T >= floor), level_T, 0).astype(np.int8)


def runs(level_T: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, end, level) of neighbouring tokens of one level."""
    if not len(level_T):
        return []
    cuts = [0, *(np.flatnonzero(np.diff(level_T)) + 1).tolist(), len(level_T)]
    return [(a, b, int(level_T[a])) for a, b in zip(cuts, cuts[1:], strict=False)]


def logarithmic(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64 sign(x) * log(1 + |x| / UNIT); NaN where x is not finite."""
    values_T = np.asarray(values, np.float64)
    known_T = np.where(np.isfinite(values_T), values_T, np.nan)
    return np.sign(known_T) * np.log1p(np.abs(known_T) / UNIT)


def codes(logarithmic_T: np.ndarray, step: float) -> np.ndarray:
    """int64 codes c of the numbers sign(c) * UNIT * (exp(|c| * step) - 1)."""
    finite_T = np.isfinite(logarithmic_T)
    codes_T = np.rint(np.where(finite_T, logarithmic_T, 0.0) / step).astype(np.int64)
    return np.where(finite_T, codes_T, NOT_FINITE)


def fit(rollouts: Sequence[RolloutTokens], room: int) -> Detail:
    """The most detail whose numbers, colours and alternatives take `room` bytes or less; the
    least there is where even that is more."""
    step, size = PRECISIONS[0], 0
    for step in PRECISIONS:
        size = sum(len(_packed(one.numbers(step))) for one in rollouts)
        if size <= _NUMBERS_SHARE * room:
            break
    room -= size
    floor, size = _floor(rollouts, int(_COLOURS_SHARE * room))
    return Detail(step, floor, _least_alternative(rollouts, room - size))


def _floor(rollouts: Sequence[RolloutTokens], room: int) -> tuple[float, int]:
    """The lowest |A| from which runs of colour take at most `room` bytes, and what they take."""
    floor, size = EDGES[0], 0
    advantages = [a for one in rollouts for a in one.advantages.values()]
    # a view ends with a token that belongs to no run
    all_N = np.concatenate([np.append(a, 0.0) for a in advantages] or [np.zeros(1)])
    cost = {level: 2 * len(tag) + 5 for level, tag in TAGS.items()}
    for floor in np.geomspace(EDGES[0], 64.0, 49).tolist():
        level_N = levels(all_N, floor)
        begins = level_N[1:][np.diff(level_N) != 0]
        size = sum(length * int((begins == level).sum()) for level, length in cost.items())
        if size <= room:
            break
    return floor, size


def _least_alternative(rollouts: Sequence[RolloutTokens], room: int) -> float:
    """The least |A| from which alternatives take at most `room` bytes. By estimate: their JSON
    deflates to half, and as text takes a quarter more."""
    costs = []
    for view in (view for rollout in rollouts for view in rollout.taught):
        for advantage, row in zip(view.advantage, view.alternatives, strict=False):
            text = sum(len(text) + 9 for text, _ in row)
            size = abs(advantage) if math.isfinite(advantage) else 0.0
            costs.append((size, (text + 8) * 0.5 * 5 / 4))
    costs.sort(reverse=True)
    total = 0.0
    for size, cost in costs:
        total += cost
        if total > room:
            return float(np.nextafter(size, np.inf))
    return 0.0


def _planes(codes_T: np.ndarray) -> tuple[bytes, bytes]:
    written_T = np.where(codes_T < 0, -2 * codes_T - 1, 2 * codes_T).astype("<u2")
    bytes_T2 = np.ascontiguousarray(written_T).view(np.uint8).reshape(-1, 2)
    return bytes_T2[:, 0].tobytes(), bytes_T2[:, 1].tobytes()


def _packed(parts: Sequence[bytes]) -> str:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_FILTERED)
    # a block for each part, so that each has a code of its own
    packed = [deflater.compress(part) + deflater.flush(zlib.Z_BLOCK) for part in parts]
    data = b"".join(packed) + deflater.flush()
    return base64.b85encode(data).translate(_IN_HTML).decode()


def _short(value: float) -> float | None:
    """Three significant digits; JSON has no NaN."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
