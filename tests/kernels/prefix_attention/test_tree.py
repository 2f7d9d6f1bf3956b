"""Trees: index maps, positions, spans, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_attention_cases import check, inputs, random_tree, step

from fastsd_kernels.prefix_attention import PrefixTree
from fastsd_kernels.prefix_attention.plan import level_calls, segment_calls


def test_index_maps():
    tree = PrefixTree([3, 2, 1, 0, 2], [None, 0, 1, 0, None])
    assert (tree.tokens, tree.prefix_tokens) == (8, 0)
    assert tree.starts == (0, 3, 5, 6, 6)
    assert tree.depths == (0, 1, 2, 1, 0)
    assert tree.spans == ((0, 6), (3, 6), (5, 6), (6, 6), (6, 8))
    assert tree.segment_of_T.tolist() == [0, 0, 0, 1, 1, 2, 4, 4]
    assert tree.position_of_T.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_index_maps_with_prefixes_from_outside():
    tree = PrefixTree([5, 3, 2, 4, 1], [None, None, 0, 0, 1], outside=2)
    assert (tree.tokens, tree.prefix_tokens) == (7, 8)
    assert tree.starts == (0, 5, 0, 2, 6)
    assert tree.spans == ((0, 6), (6, 7), (0, 2), (2, 6), (6, 7))
    assert tree.position_of_T.tolist() == [5, 6, 5, 6, 7, 8, 3]
    with pytest.raises(ValueError, match="segment 0 is not contiguous"):
        PrefixTree([5, 3, 2, 1, 4], [None, None, 0, 1, 0], outside=2)


def test_branches_start_where_the_prefix_ends():
    tree = PrefixTree([5, 2, 3], [None, 0, 0], outside=1)
    assert (tree.tokens, tree.prefix_tokens) == (5, 5)
    assert tree.spans == ((0, 5), (0, 2), (2, 5))
    assert tree.position_of_T.tolist() == [5, 6, 5, 6, 7]


def test_equal_trees_are_equal_keys():
    a, b = (PrefixTree([2, 1], [None, 0]) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != PrefixTree([2, 1], [None, None])
    assert segment_calls(a) is segment_calls(b)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([3, 2], [None]), "parents: expected one per segment, 2 of them"),
        (([3, -2], [None, 0]), r"lengths\[1\]: expected 0 or more tokens, got -2"),
        (([3, 2.0], [None, 0]), r"lengths\[1\]: expected an int, got float"),
        (([3, True], [None, 0]), r"lengths\[1\]: expected an int, got bool"),
        (([3, 2], [None, 1]), r"parents\[1\]: expected an earlier segment"),
        (([3, 2], [None, -1]), r"parents\[1\]: .* got -1"),
        (([3, 2], [None, "0"]), r"parents\[1\]: expected an int or None, got str"),
        (([3, 2], [None, 0], 3), "outside: expected a number of segments from 0 to 2, got 3"),
        (([3, 2], [None, 0], True), "outside: .* got True"),
        (([1, 1, 1, 1], [None, 0, None, 0]), "below segment 0 is not contiguous"),
        (([1, 1, 1, 1], [None, 0, 0, 1]), "below segment 1 is not contiguous"),
    ],
)
def test_bad_trees(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PrefixTree(*arguments)


def test_calls_take_every_pair_once():
    """No key of a call stands twice in it, and prefixes are views, not gathers."""
    tree = PrefixTree([9, 4, 2, 3, 7], [None, 0, 1, 1, 0])
    calls = segment_calls(tree)
    assert [(c.queries, c.keys) for c in calls[:2]] == [
        (slice(0, 25), slice(0, 9)),
        (slice(9, 18), slice(9, 13)),
    ]
    assert len(calls) == 5
    own, root, deep = level_calls(tree, torch.device("cpu"))
    assert (own.queries, own.keys, own.causal) == (slice(0, 25), slice(0, 25), True)
    assert (root.queries, root.keys, root.causal) == (slice(9, 25), slice(0, 9), False)
    assert (deep.queries, deep.keys) == (slice(13, 18), slice(9, 13))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_random_trees(seed):
    tree = random_tree(seed)
    x = inputs(tree, 2, 1, 4)
    check(
        step(x, tree, torch.float64, "torch"),
        step(x, tree, torch.float64, "reference"),
        torch.float64,
    )
