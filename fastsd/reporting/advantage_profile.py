"""What the figures of per-token advantages show, as numbers: everything but the drawing.

Tokens are placed relative to the first wrong step of their response, as in `fastsd.advantage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastsd.evaluation.localisation import place
from fastsd.evaluation.views import TokenView, by_rollout

REACH = 200  # tokens before and after the start of the first wrong step
BINS = 50
PLACES = {"before": "right steps", "at": "first wrong step", "after": "later steps"}


def shown_response(wrong: Sequence[TokenView]) -> list[TokenView]:
    """The views of the first wrong response that has right steps before its error and was shown to
    the most contexts: no choice by what the figure looks like."""
    groups = by_rollout(wrong)
    most = max(map(len, groups))
    whole = [group for group in groups if len(group) == most]
    return next((group for group in whole if group[0].first_error), whole[0])


def profiles(wrong: Sequence[TokenView]) -> dict[str, tuple[list[float], list[float]]]:
    """By context (x, mean |A|): x counts tokens from the first wrong step's first, in bins."""
    sums: dict[str, dict[int, list[float]]] = {}
    for view in wrong:
        start = places(view).index("at") if "at" in places(view) else None
        if start is None:
            continue
        offsets = sums.setdefault(view.context, {})
        for index, advantage in enumerate(view.advantage):
            if abs(index - start) <= REACH:
                offsets.setdefault(index - start, []).append(abs(advantage))
    known = {x for offsets in sums.values() for x in offsets}
    width = max(1, math.ceil((max(known) - min(known) + 1) / BINS)) if known else 1
    return {name: _binned(offsets, width) for name, offsets in sums.items()}


def _binned(offsets: Mapping[int, list[float]], width: int) -> tuple[list[float], list[float]]:
    bins: dict[int, list[float]] = {}
    for x, values in offsets.items():
        bins.setdefault(x // width, []).extend(values)
    # A bin that few responses reach says nothing about the others.
    least = max(map(len, bins.values())) / 10
    kept = sorted(b for b, values in bins.items() if len(values) >= least)
    middle = [b * width + (width - 1) / 2 for b in kept]
    return middle, [math.fsum(bins[b]) / len(bins[b]) for b in kept]


def wrong_tokens(wrong: Sequence[TokenView]) -> float:
    """Mean length of the first wrong step in tokens."""
    return sum(places(view).count("at") for view in wrong) / len(wrong)


def distributions(taught: Sequence[TokenView]) -> dict[str, dict[str, list[float]]]:
    """Place -> context -> A of its tokens; right steps are those before the first wrong one, and
    all of a right response."""
    found: dict[str, dict[str, list[float]]] = {}
    for view in taught:
        unmarked = view.first_error is None and view.reward is not None and view.reward < 1.0
        if view.steps and not unmarked:
            for where, advantage in zip(places(view), view.advantage, strict=True):
                found.setdefault(where, {}).setdefault(view.context, []).append(advantage)
    return {where: found[where] for where in PLACES if where in found}


def places(view: TokenView) -> list[str]:
    """ "before", "at" or "after" the first wrong step, by token; all "before" without one."""
    if view.first_error is None:
        return ["before"] * len(view.spans)
    return [place(span, view.steps[view.first_error]) for span in view.spans]
