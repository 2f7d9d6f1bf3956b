"""Decode attention against its definition in fp64, step by step; both implementations.

Every bound is of one element, with A = sum of P |v| from the definition, S positions, u = 2^-24:
the scores are off by d = (H + 2) u scale |q| max |k| at most, which moves each weight by
e^(2 d) - 1 of itself; exp and sums add (8 + S) u. In bf16 weights and results are rounded to 8
bits.
Shape suffixes: B rows, N query heads, K key/value heads, H head dim, L prefix positions.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_cases import BF16, FP32, FP64, IMPLS

from fastsd_kernels import PrefixDecodeCache
from fastsd_kernels.prefix_decode.reference import ReferenceDecode


class Steps:
    """A cache beside the definition: the same calls go to both, results are compared."""

    def __init__(self, heads, kv_heads, head_dim, slots, positions, dtype, impl="auto", layers=2,
                 threads=1, seed=0):  # fmt: skip
        self.cache = PrefixDecodeCache(
            layers, kv_heads, head_dim, slots, positions, dtype, "cpu", impl, threads
        )
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.layers, self.scale = layers, head_dim**-0.5
        self.exact, self.absolute = ReferenceDecode(), ReferenceDecode()
        self.generator = torch.Generator().manual_seed(seed)
        self.length: dict[int, int] = {}  # of a prefix
        self.longest_key = 0.0

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=FP64).to(self.dtype)

    def admit(self, prefix: int, length: int, factor: float = 1.0) -> None:
        shape = (self.kv_heads, length, self.head_dim)
        layers = [(self.normal(*shape) * factor, self.normal(*shape)) for _ in range(self.layers)]
        self.cache.admit(prefix, layers)
        self.exact.admit(prefix, [(key.double(), value.double()) for key, value in layers])
        self.absolute.admit(prefix, [(key.double(), value.double().abs()) for key, value in layers])
        self.length[prefix] = length
        self._seen_keys(*(key for key, _ in layers))

    def drop(self, prefix: int) -> None:
        for one in (self.cache, self.exact, self.absolute):
            one.drop(prefix)

    def _seen_keys(self, *keys: torch.Tensor) -> None:
        norms = [float(key.double().norm(dim=-1).max()) for key in keys if key.numel()]
        self.longest_key = max([self.longest_key, *norms])

    def step(self, rows: list[tuple[int, int, int]], factor: float = 1.0) -> list[torch.Tensor]:
        """rows: (slot, prefix, length). Results by layer, checked."""
        named = [np.array(column, np.int64) for column in zip(*rows, strict=True)]
        for one in (self.cache, self.exact, self.absolute):
            one.begin(*named)
        results = []
        for layer in range(self.layers):
            query_BNH = self.normal(len(rows), self.heads, self.head_dim) * factor
            key_BKH, value_BKH = (
                self.normal(len(rows), self.kv_heads, self.head_dim) for _ in range(2)
            )
            self._seen_keys(key_BKH)
            given = (query_BNH, key_BKH, value_BKH)
            found = self.cache.attend(layer, *given, self.scale)
            wide = [x.double() for x in given]
            exact = self.exact.attend(layer, *wide, self.scale)
            absolute = self.absolute.attend(layer, *wide[:2], wide[2].abs(), self.scale)
            self.check(found, exact, absolute, query_BNH, rows)
            results.append(found)
        return results

    def check(self, found, exact, absolute, query_BNH, rows) -> None:
        assert found.shape == exact.shape and found.dtype == self.dtype
        positions = max(self.length[prefix] + length + 1 for _, prefix, length in rows)
        wide = self.dtype == FP64
        u = 2**-53 if wide else 2**-24
        query_BN1 = query_BNH.double().norm(dim=-1, keepdim=True)
        d_BN1 = (self.head_dim + 2) * u * self.scale * query_BN1 * self.longest_key
        bound = absolute * (torch.expm1(2 * d_BN1) + (8 + positions) * u)
        if self.dtype == BF16:
            bound = bound + 2**-8 * (absolute + exact.abs() + bound)
        assert bool(((found.double() - exact).abs() <= bound).all()), rows


# Query heads, key/value heads, head dim.
HEADS = [(3, 3, 16), (9, 3, 64), (8, 1, 80), (4, 2, 128), (2, 1, 256), (40, 2, 33), (1, 1, 1)]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_ragged_prefixes(impl, heads, dtype):
    both = Steps(*heads, slots=12, positions=4, dtype=dtype, impl=impl)
    for prefix, length in enumerate((0, 1, 31, 257, 1000)):
        both.admit(prefix, length)
    groups = [(4, 3), (0, 2), (3, 5), (1, 1), (2, 1)]
    prefix_B = [prefix for prefix, count in groups for _ in range(count)]
    for length in range(4):
        slots = [(5 * row + 3) % 12 for row in range(12)]
        both.step([(slot, p, length) for slot, p in zip(slots, prefix_B, strict=True)])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_across_panels_and_chunks(impl, dtype):
    if impl == "native" and dtype == FP64:
        pytest.skip("native takes float32 and bfloat16")
    both = Steps(3, 1, 16, slots=3, positions=258, dtype=dtype, impl=impl, layers=1)
    both.admit(7, 33)
    both.admit(-2, 0)
    for length in range(258):  # three rows at three lengths
        rows = [(0, 7, length), (1, 7, length - 30), (2, -2, length // 2)]
        both.step([row for row in rows if row[2] >= 0])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_slots_and_prefixes_come_and_go(impl, dtype):
    """What was in a slot before, or where a prefix was, not a number here, does not matter."""
    both = Steps(6, 2, 24, slots=4, positions=40, dtype=dtype, impl=impl)
    both.cache.admit(0, [(torch.full((2, 50, 24), torch.nan, dtype=dtype),) * 2] * 2)
    both.cache.drop(0)
    both.admit(0, 5)
    nothing = [torch.full((2, h, 24), torch.nan, dtype=dtype) for h in (6, 2, 2)]
    for length in range(40):
        both.cache.begin(np.array([1, 3]), np.zeros(2, np.int64), np.full(2, length))
        for layer in range(2):
            assert both.cache.attend(layer, *nothing, 0.1).isnan().all()
    both.admit(1, 70)
    both.drop(0)
    both.admit(2, 3)
    for length in range(35):
        both.step([(3, 1, length), (0, 1, length), (1, 2, length)])
        if length == 20:
            both.admit(0, 130)
            both.drop(2)
            both.step([(2, 0, 0)])
            both.admit(2, 9)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_scores(impl, dtype):
    """Scores of +-1e4: the largest decides alone, nothing overflows."""
    both = Steps(4, 2, 64, slots=4, positions=3, dtype=dtype, impl=impl)
    both.admit(0, 300, factor=100.0)
    both.admit(1, 2, factor=100.0)
    for length in range(3):
        results = both.step([(0, 0, length), (1, 0, length), (2, 1, length)], factor=100.0)
        assert all(bool(x.isfinite().all()) for x in results)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl):
    """Heads of a fused projection, and a transposed layout."""
    dense = PrefixDecodeCache(1, 2, 8, 3, 2, FP32, "cpu", impl)
    other = PrefixDecodeCache(1, 2, 8, 3, 2, FP32, "cpu", impl)
    prefix_KLH = torch.randn(2, 5, 8)
    dense.admit(0, [(prefix_KLH, prefix_KLH)])
    turned = prefix_KLH.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    other.admit(0, [(turned, prefix_KLH.transpose(0, 1).contiguous().transpose(0, 1))])
    fused = torch.randn(3, 8, 8)
    parts = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in parts]
    for cache in (dense, other):
        cache.begin(np.arange(3), np.zeros(3, np.int64), np.zeros(3, np.int64))
    expected = dense.attend(0, *(x.contiguous() for x in parts), 1.0)
    assert torch.equal(dense.attend(0, *parts, 1.0), expected)
    assert torch.equal(other.attend(0, *turned, 1.0), expected)
