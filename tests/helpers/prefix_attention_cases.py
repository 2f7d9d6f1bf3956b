"""What the tests of shared-prefix attention share: trees, inputs, budgets, one training step.

Shapes: T tokens of the pack, P of prefixes from outside, N query heads, K key/value heads, H head
dim.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fastsd_kernels.prefix_attention import PrefixTree, shared_prefix_attention
from fastsd_kernels.testing import FP32_ERROR, relative_error

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")

FP64_ERROR = 1e-13  # sums of up to some 100 terms, u = 1.1e-16
BF16_ROUNDING = 2**-8 / 3**0.5  # the largest rms of one rounding, relative

TREES = {
    "group": PrefixTree([9, 4, 7, 1], [None, 0, 0, 0]),
    "no prefix": PrefixTree([13], [None]),
    "one token": PrefixTree([1], [None]),
    "prefix of one": PrefixTree([1, 5, 3], [None, 0, 0]),
    "one branch": PrefixTree([6, 11], [None, 0]),
    "64 branches": PrefixTree([7, *(i % 5 for i in range(64))], [None] + [0] * 64),
    "empty branches": PrefixTree([5, 0, 4, 0], [None, 0, 0, 0]),
    "empty prefix": PrefixTree([0, 3, 4], [None, 0, 0]),
    "nothing below": PrefixTree([4, 0, 0], [None, 0, 0]),
    "depth 3": PrefixTree([5, 4, 3, 6, 2, 7, 1], [None, 0, 1, 1, 0, 4, 4]),
    "depth 5": PrefixTree([2, 3, 0, 4, 1, 5], [None, 0, 1, 2, 3, 3]),
    "questions": PrefixTree([6, 3, 5, 2, 4, 1, 8], [None, 0, 0, None, 3, 3, None]),
    "outside": PrefixTree([8, 3, 5], [None, 0, 0], outside=1),
    "outside of one": PrefixTree([1, 2, 4], [None, 0, 0], outside=1),
    "outside, empty": PrefixTree([0, 2, 4], [None, 0, 0], outside=1),
    "outside, deep": PrefixTree([5, 4, 3, 6, 2], [None, 0, 1, 1, 0], outside=1),
    "outsides": PrefixTree([5, 3, 4, 2, 1, 6, 3], [None, None, 0, 2, 1, 4, None], outside=2),
    "outside below outside": PrefixTree([5, 3, 4, 2, 6], [None, 0, 1, 1, 0], outside=2),
}
# Several hundred tokens: more than one block of every kernel.
LONG = PrefixTree([300, 140, 20, 70], [None, 0, 1, 0])


def inputs(
    tree: PrefixTree, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, seed: int = 0
) -> list[Tensor]:
    """query, key, value, and prefix key and value where the tree has prefixes; bf16 values."""
    g = torch.Generator().manual_seed(seed)
    rows = [(tree.tokens, heads), (tree.tokens, kv_heads), (tree.tokens, kv_heads)]
    if tree.outside:
        rows += [(tree.prefix_tokens, kv_heads)] * 2
    shapes = [(count, number, head_dim) for count, number in rows]
    return [torch.randn(shape, generator=g).bfloat16().double() for shape in shapes]


def step(
    tensors: list[Tensor], tree: PrefixTree, dtype: torch.dtype, impl: str = "auto", **options
) -> list[Tensor]:
    """The output and the gradients of every tensor, under a fixed upstream gradient."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    out = attend(leaves, tree, impl=impl, **options)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=g).bfloat16().to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def attend(tensors: list[Tensor], tree: PrefixTree, **options) -> Tensor:
    prefixes = dict(zip(("prefix_key_PNH", "prefix_value_PNH"), tensors[3:], strict=False))
    return shared_prefix_attention(*tensors[:3], tree, **prefixes, **options)


def budget(dtype: torch.dtype, rows: int, gradient: bool) -> float:
    """Relative L2. In bf16 roundings in series count, those of summands average out.

    On an output's way are two: its part and the result. On a gradient's are four: the output it is
    formed from, the scores' gradient, its part, the result; beyond 128 rows, where the kernel runs
    in bf16, it also rounds the keys' gradients after every block of (at least 32) rows.
    """
    if dtype != torch.bfloat16:
        return FP64_ERROR if dtype == torch.float64 else FP32_ERROR
    blocks = rows / 32 if rows > 128 else 0
    return BF16_ROUNDING * (4 + blocks if gradient else 2) ** 0.5


def check(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Output and gradients within the dtype's budget."""
    for name, mine, true in zip(("out", *NAMES), found, exact, strict=False):
        assert mine.dtype == dtype and mine.shape == true.shape, name
        allowed = budget(dtype, len(found[0]), name != "out")
        assert relative_error(mine, true) < allowed, name
    assert len(found) == len(exact)


def random_tree(seed: int) -> PrefixTree:
    """Any depth, several roots, empty segments, depth-first by construction."""
    rng = random.Random(seed)
    lengths, parents = [], []

    def grow(parent: int | None, depth: int) -> None:
        index = len(lengths)
        lengths.append(rng.choice([0, 1, 1, 2, 3, 7]))
        parents.append(parent)
        for _ in range(rng.randrange(0, 4 - depth)):
            grow(index, depth + 1)

    for _ in range(rng.randrange(1, 3)):
        grow(None, 0)
    return PrefixTree(lengths, parents, outside=rng.choice([0, 1]))
