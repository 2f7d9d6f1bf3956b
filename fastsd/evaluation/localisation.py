"""Who is to blame: GRPO's advantages by response, the self-teacher's by token.

GRPO gives every token of a response the same credit. A self-teacher gives each token its own,

    A_t = log T(y_t) - log S(y_t)        (T: the model that sees the feedback; S: the solver)

and the paper's second result is where that credit falls. With a step-aligned critique A_t stays
near zero on the correct steps before the first mistake and is sharply negative at it; with somebody
else's solution it also pushes on correct tokens that are merely phrased differently. `localisation`
turns that picture into numbers. It keeps sums and counts, so that figures of several seeds or
batches are pooled by addition instead of by a mean of means.

Everything here is pure: text, offsets and numbers in, figures out. Axes: G responses of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fastsd.errors import FastsdError
from fastsd.types import Rollout, Step

Span = tuple[int, int]


class LocalisationError(FastsdError):
    """Token offsets, steps and advantages that do not describe the same text."""


def token_spans(tokenizer: Any, response_ids: Sequence[int], text: str) -> list[Span]:
    """Characters [start, end) of `text` that each response token wrote.

    Decodes a sliding window of two pieces, which is right for character-level, byte-level and
    SentencePiece tokenizers alike (a piece may lose its leading space when decoded alone). Tokens
    that together make one character, such as the bytes of an emoji, all get that character's span;
    special tokens and a last stop token, which `text` leaves out, get an empty span where they
    stand.

    Raises LocalisationError where the pieces do not add up to `text`.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    spans: list[Span] = [(0, 0)] * len(response_ids)
    plain = [at for at, token_id in enumerate(response_ids) if token_id not in special]

    def decode(positions: Sequence[int]) -> str:
        ids = [response_ids[at] for at in positions]
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    pieces, done, window, read = [], 0, 0, 0
    for stop in range(1, len(plain) + 1):
        before, now = decode(plain[window:read]), decode(plain[window:stop])
        unfinished = now.endswith("\ufffd") or len(now) <= len(before)
        if unfinished and stop < len(plain):
            continue
        pieces.append(now[len(before) :])
        for at in plain[read:stop]:
            spans[at] = (done, done + len(pieces[-1]))
        done += len(pieces[-1])
        window, read = read, stop
    joined = "".join(pieces)
    # a stop token that is not special decodes to text, which the sampler leaves out
    stop_only = joined.startswith(text) and plain and spans[plain[-1]][0] == len(text)
    if joined != text and not stop_only:
        raise LocalisationError(
            f"the response's tokens decode to {joined[:80]!r}..., its text is "
            f"{text[:80]!r}...: pass the text as the tokenizer decodes it, without special tokens"
        )
    spans = [(start, min(end, len(text))) for start, end in spans]
    end = len(text)
    for at in reversed(range(len(spans))):
        if response_ids[at] in special:
            spans[at] = (end, end)
        end = spans[at][0]
    return spans


@dataclass(frozen=True)
class Region:
    """Sums over the tokens of one kind: how many, total |A|, total of negative A (as a positive
    number), how many negative."""

    tokens: int = 0
    absolute: float = 0.0
    negative: float = 0.0
    negative_tokens: int = 0

    def __add__(self, other: Region) -> Region:
        return Region(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Region)))

    @classmethod
    def of(cls, advantages: Iterable[float]) -> Region:
        values = list(advantages)
        negative = [-a for a in values if a < 0]
        return cls(len(values), math.fsum(map(abs, values)), math.fsum(negative), len(negative))

    @property
    def mean(self) -> float | None:
        """Mean |A|; None where there is no token."""
        return self.absolute / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Localisation:
    """Where the advantage falls.

    Regions `before`, `at`, `after` the first wrong step are summed over the responses that have
    one, `correct` over fully correct responses. `peak` sums, over wrong responses, the largest |A|
    within the first wrong step. `unplaced`: responses whose steps could not be read, or all of
    whose steps are right while the reward is not.
    """

    before: Region = Region()
    at: Region = Region()
    after: Region = Region()
    correct: Region = Region()
    peak: float = 0.0
    wrong_responses: int = 0
    correct_responses: int = 0
    unplaced: int = 0

    def __add__(self, other: Localisation) -> Localisation:
        names = [f.name for f in fields(Localisation)]
        return Localisation(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def mean_peak(self) -> float | None:
        return self.peak / self.wrong_responses if self.wrong_responses else None

    @property
    def negative_share_correct(self) -> float | None:
        """Fraction of tokens with negative A on fully correct responses."""
        return _share(self.correct.negative_tokens, self.correct.tokens)

    def share(self, region: str, kind: str = "absolute") -> float | None:
        """Share of |A| (kind "absolute") or of negative A ("negative") that falls on the region."""
        total = sum(getattr(getattr(self, r), kind) for r in ("before", "at", "after"))
        return _share(getattr(getattr(self, region), kind), total)

    def to_json(self) -> dict[str, Any]:
        """The sums under "sums", and the figures that people read beside them."""
        mean = {r: getattr(self, r).mean for r in ("before", "at", "after", "correct")}
        return {
            "mean_abs": {**mean, "peak": self.mean_peak},
            "share_abs": {r: self.share(r) for r in ("before", "at", "after")},
            "share_negative": {r: self.share(r, "negative") for r in ("before", "at", "after")},
            "negative_share_correct": self.negative_share_correct,
            "sums": asdict(self),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Localisation:
        """Inverse of `to_json`: rebuilds from the sums, so that results can be added."""
        sums = record["sums"]
        regions = {r: Region(**sums[r]) for r in ("before", "at", "after", "correct")}
        return cls(**{**sums, **regions})


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def place(span: Span, wrong: Step) -> str:
    """ "before", "at" or "after": a token that shares a character with the wrong step is at it.

    An empty span (a stop token) takes the place of the character it stands in front of.
    """
    start, end = span
    if start < wrong.end and max(end, start + 1) > wrong.start:
        return "at"
    return "before" if start < wrong.start else "after"


def _localise(
    rollout: Rollout, advantages: Sequence[float], steps: Sequence[Step], spans: Sequence[Span]
) -> Localisation:
    """The figures of one response."""
    wrong = next((step for step in steps if not step.correct), None)
    if wrong is None:
        if not steps or (rollout.reward is not None and rollout.reward < 1.0):
            return Localisation(unplaced=1)
        return Localisation(correct=Region.of(advantages), correct_responses=1)
    placed: dict[str, list[float]] = {"before": [], "at": [], "after": []}
    for advantage, span in zip(advantages, spans, strict=True):
        placed[place(span, wrong)].append(advantage)
    regions = {region: Region.of(values) for region, values in placed.items()}
    peak = max(map(abs, placed["at"]), default=0.0)
    return replace(Localisation(wrong_responses=1, peak=peak), **regions)


def localisation(
    rollouts: Sequence[Rollout],
    advantages: Sequence[Sequence[float]],
    steps: Sequence[Sequence[Step]],
    spans: Sequence[Sequence[Span]],
) -> Localisation:
    """Pool the per-token advantages of many responses by place relative to the first wrong step.

    One entry per rollout: advantages A_t = log T(y_t) - log S(y_t) of each response token, its
    steps in order, and each token's characters (`token_spans`). Raises LocalisationError, with the
    rollout's index, where lengths differ or an advantage is not finite.
    """
    if not len(rollouts) == len(advantages) == len(steps) == len(spans):
        raise LocalisationError(
            f"one entry per rollout is needed; found {len(rollouts)} rollouts, {len(advantages)} "
            f"rows of advantages, {len(steps)} of steps and {len(spans)} of spans"
        )
    total = Localisation()
    for index, one in enumerate(zip(rollouts, advantages, steps, spans, strict=True)):
        rollout, values, _, offsets = one
        if not len(rollout.response_ids) == len(values) == len(offsets):
            raise LocalisationError(
                f"rollout {index} has {len(rollout.response_ids)} tokens, {len(values)} advantages "
                f"and {len(offsets)} spans"
            )
        if not all(map(math.isfinite, values)):
            raise LocalisationError(f"rollout {index} has an advantage that is not finite")
        total = total + _localise(*one)
    return total
