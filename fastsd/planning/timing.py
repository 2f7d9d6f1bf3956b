"""Times pieces of work on this machine: the clock is the process's own, so that other programs
disturb little. A rate is a range, from the fastest round to the median one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

# What is larger is measured on a part. MOST_BYTES is several times a cache, so that what a model
# reads from memory is read from memory here too.
MOST_FLOP = 4e9
MOST_BYTES = 200e6
_ROUNDS = 5


class Rate(NamedTuple):
    """Seconds of a unit of work: in the fastest round and in the median one."""

    low: float
    high: float


_SECONDS = 0.06


def rate(run: Callable[[], object], units: float, aside: Callable[[], float] = lambda: 0.0) -> Rate:
    """Seconds a unit over some rounds, fewer of slow ones, after one that is not counted. aside:
    seconds that the calls so far spent on what is not to be counted."""
    first = max(spent(run), 1e-6)
    calls, rounds = (
        max(1, round(_SECONDS / _ROUNDS / first)),
        _ROUNDS if first < _SECONDS / 2 else 2,
    )

    def calls_in_a_row() -> None:
        for _ in range(calls):
            run()

    found = []
    for _ in range(rounds):
        before = aside()
        seconds = spent(calls_in_a_row)
        found.append((seconds - (aside() - before)) / calls / units)
    return span(found)


def spent(run: Callable[[], object]) -> float:
    """Seconds of this process for one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def span(rounds: Sequence[float]) -> Rate:
    return Rate(min(rounds), statistics.median(rounds))


def times(each: Rate, units: float) -> Rate:
    return Rate(each.low * units, each.high * units)


def total(rates: Sequence[Rate]) -> Rate:
    return Rate(sum(each.low for each in rates), sum(each.high for each in rates))
