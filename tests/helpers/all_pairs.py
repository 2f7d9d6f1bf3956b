"""A sweep over the product of some options, of which the fast tests run all pairs.

Every pair of values that occurs in the product occurs in a case of the fast tier; the other cases
are marked slow, so both tiers together are the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest

Factors = Mapping[str, object]


def pairs(factors: Factors) -> set[tuple]:
    """All pairs of the case's (name, value); a case of one factor has that one alone."""
    values = sorted((name, repr(value)) for name, value in factors.items())
    return set(combinations(values, 2)) or set(values)


def covering(cases: Sequence[Factors]) -> set[int]:
    """Indices of a few cases with all pairs of all cases: always the one with the most new pairs,
    the first of several."""
    found = [pairs(case) for case in cases]
    left, chosen = set().union(*found), set()
    while left:
        best = max(range(len(cases)), key=lambda index: len(found[index] & left))
        chosen.add(best)
        left -= found[best]
    return chosen


def sweep(cases: Sequence[tuple[tuple, str, Factors]]) -> list:
    """pytest.param of each (arguments, id, factors), slow where its pairs are those of others."""
    fast = covering([factors for _, _, factors in cases])
    return [
        pytest.param(*arguments, id=name, marks=() if index in fast else pytest.mark.slow)
        for index, (arguments, name, _) in enumerate(cases)
    ]
