"""What the sweeps of the kernels' tests leave to the slow tier: no pair of values."""

from __future__ import annotations

from itertools import product

from all_pairs import covering, pairs, sweep
from native_cases import CASES, DTYPES, native_sweep

PRODUCT = [dict(zip("abcd", values, strict=True)) for values in product(range(4), repeat=4)]


def test_every_pair_of_a_product_occurs():
    chosen = covering(PRODUCT)
    seen = set().union(*(pairs(PRODUCT[index]) for index in chosen))
    assert len(seen) == 6 * 16  # six pairs of factors, sixteen of values each
    assert 16 <= len(chosen) <= 32  # at least as many as the pairs of two factors
    assert chosen == covering(PRODUCT)


def test_combinations_that_do_not_exist_are_not_asked_for():
    cases = [case for case in PRODUCT if case["a"] != 0 or case["b"] == 0]
    seen = set().union(*(pairs(cases[index]) for index in covering(cases)))
    assert seen == set().union(*map(pairs, cases)) and (("a", "0"), ("b", "1")) not in seen


def test_both_tiers_are_the_product():
    every = native_sweep(scale=[1e4, 30.0], dtype=DTYPES)
    assert len(every) == len(CASES) * 4 == len({case.id for case in every})
    fast = [case for case in every if not case.marks]
    assert 0 < len(fast) < len(every) / 2
    assert not sweep([((), "alone", {"a": 1})])[0].marks
