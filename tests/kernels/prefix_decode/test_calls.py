"""The decode cache: rows' bits, recorded graphs, capacity, errors, every instruction set.

Shape suffixes: B rows, K key/value heads, L prefix positions, H head dim.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from decode_cases import BF16, FP32, FP64, IMPLS, needs_library
from instruction_sets import SETS, linux, run, runs_here
from torch.fx.experimental.proxy_tensor import make_fx

from fastsd_kernels import PrefixDecodeCache, native_library
from fastsd_kernels.native_library import instruction_set


def rows_of(*rows: tuple[int, int, int]) -> list[np.ndarray]:
    return [np.array(column, np.int64) for column in zip(*rows, strict=True)]


def filled(dtype, threads: int, slots: int, prefixes: dict[int, int]) -> PrefixDecodeCache:
    """Equal contents whatever the slots and the order of prefixes."""
    cache = PrefixDecodeCache(1, 3, 40, slots, 300, dtype, "cpu", "native", threads)
    for prefix, length in prefixes.items():
        g = torch.Generator().manual_seed(prefix)
        key_KLH, value_KLH = torch.randn(2, 3, length, 40, generator=g).to(dtype)
        cache.admit(prefix, [(key_KLH, value_KLH)])
    return cache


@needs_library
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype):
    """Whatever slots, groups, neighbours and threads there are."""
    lengths = {5: 300, 3: 0, 8: 33}
    prefix_B = np.repeat([5, 3, 8], [8, 1, 6])
    rows = len(prefix_B)
    g = torch.Generator().manual_seed(0)
    given = torch.randn(262, 3, rows, 12, 40, generator=g).to(dtype)
    begins_B = np.arange(rows) * 3  # row i joins at step 3 i

    def results(batch, threads, slots, steps=262) -> dict[int, list[torch.Tensor]]:
        cache = filled(dtype, threads, slots, dict(sorted(lengths.items(), reverse=slots > rows)))
        found: dict[int, list[torch.Tensor]] = {row: [] for row in batch}
        for step in range(steps):
            here = [row for row in batch if begins_B[row] <= step]
            if not here:
                continue
            cache.begin(*rows_of(*((slots - 1 - r, prefix_B[r], step - begins_B[r]) for r in here)))
            query, key, value = given[step][:, here]
            out = cache.attend(0, query, key[:, :3], value[:, :3], 0.3)
            for i, row in enumerate(here):
                found[row].append(out[i])
        return found

    whole = results(list(range(rows)), 1, rows)
    for batch, *more in (
        [list(range(rows)), 2, rows + 2, 60], [[0], 1, 40], [[7], 3, 15, 70], [[8], 2, 15, 70],
        [[14], 1, 99], [[1, 2, 9, 14], 3, rows, 60],
    ):  # fmt: skip
        for row, found in results(batch, *more).items():
            assert torch.equal(torch.stack(found), torch.stack(whole[row][: len(found)])), row


def test_a_recorded_graph_serves_later_steps():
    """What a CUDA graph does: the operations of one `attend`, recorded, run on other inputs."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    g = torch.Generator().manual_seed(0)
    prefixes = [(p, [tuple(normal(2, length, 8) for _ in "kv")]) for p, length in ((0, 3), (1, 70))]
    caches = [PrefixDecodeCache(1, 2, 8, 6, 9, FP32, "cpu", "torch") for _ in range(2)]
    for cache in caches:
        for prefix, layers in prefixes:
            cache.admit(prefix, layers)
    recorded, capacity = None, (2, 128, 3)
    steps = [
        rows_of((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 1, 0)),
        rows_of((0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 1, 1)),
        rows_of((5, 1, 0), (3, 1, 2), (2, 0, 2), (1, 0, 2)),
        rows_of((1, 0, 3), (5, 1, 1), (3, 1, 3), (4, 1, 0)),
    ]
    for step in steps:
        given = normal(4, 6, 8), normal(4, 2, 8), normal(4, 2, 8)
        for cache in caches:
            cache.begin(*step)
        if recorded is None:
            recorded = make_fx(lambda q, k, v: caches[0].attend(0, q, k, v, 0.4))(*given)
            names = {str(node.target) for node in recorded.graph.nodes}
            # What reads a number on the host, or has a shape that depends on data.
            assert not [n for n in names if "_local_scalar" in n or "nonzero" in n or "item" in n]
        found, expected = recorded(*given), caches[1].attend(0, *given, 0.4)
        assert torch.equal(found, expected)
        assert caches[0].capacity == capacity


def test_capacity_grows():
    cache = PrefixDecodeCache(1, 1, 4, 3, 2, FP32, "cpu", "torch")
    nothing = torch.zeros(1, 0, 4)
    assert cache.capacity == (0, 0, 1)
    cache.admit(0, [(nothing, nothing)])
    assert cache.capacity == (1, 0, 1)
    cache.admit(1, [(torch.zeros(1, 65, 4),) * 2])
    cache.admit(2, [(nothing, nothing)])
    assert cache.capacity == (4, 128, 1)
    cache.begin(*rows_of((0, 1, 0), (1, 1, 0), (2, 0, 0)))
    assert cache.capacity == (4, 128, 2)
    cache.drop(1)
    cache.admit(3, [(nothing, nothing)])
    cache.begin(*rows_of((0, 3, 0)))
    assert cache.capacity == (4, 128, 2)


def refused(kind, text: str, call, *args) -> None:
    with pytest.raises(kind, match=text):
        call(*args)


def test_construction_errors(monkeypatch):
    good = [2, 2, 8, 3, 4, FP32, "cpu"]
    names = ("layers", "kv_heads", "head_dim", "slots", "max_new_tokens")
    for place, name in enumerate(names):
        bad = good[:place] + [0] + good[place + 1 :]
        refused(ValueError, f"{name}: expected at least 1, got 0", PrefixDecodeCache, *bad)
    refused(ValueError, "dtype: .*torch.int64", PrefixDecodeCache, *good[:5], torch.int64, "cpu")
    refused(ValueError, "threads: .* got 0", PrefixDecodeCache, *good, "auto", 0)
    refused(ValueError, "impl: .* got 'fast'", PrefixDecodeCache, *good, "fast")
    refused(RuntimeError, "native takes float32 and bfloat16, got torch.float64",
            PrefixDecodeCache, *good[:5], FP64, "cpu", "native")  # fmt: skip
    refused(RuntimeError, "native runs on CPU tensors, got cuda", PrefixDecodeCache, *good[:6],
            "cuda", "native")  # fmt: skip
    assert PrefixDecodeCache(*good[:5], FP64, "cpu").impl == "torch"
    monkeypatch.setattr(native_library, "library", lambda: None)
    refused(RuntimeError, "'native' cannot run: .*install g.*use impl='torch'",
            PrefixDecodeCache, *good, "native")  # fmt: skip
    assert PrefixDecodeCache(*good).impl == "torch"


@needs_library
def test_auto_takes_native():
    for dtype in (FP32, BF16):
        assert PrefixDecodeCache(1, 1, 8, 1, 1, dtype, "cpu").impl == "native"


@pytest.mark.parametrize("impl", IMPLS)
def test_errors_name_the_argument(impl):
    cache = PrefixDecodeCache(2, 2, 8, 3, 4, FP32, "cpu", impl)
    part = torch.zeros(2, 5, 8)
    admit, begin, attend = cache.admit, cache.begin, cache.attend
    refused(ValueError, "layers: expected 2 layers, got 1", admit, 0, [(part, part)])
    refused(ValueError, r"layers\[1\] value_KLH: expected shape \[2, 5, 8\], got \[2, 4, 8\]",
            admit, 0, [(part, part), (part, part[:, :4])])  # fmt: skip
    refused(ValueError, r"value_KLH: .*\[2, 5, 4\]; .*\(MLA\) are not supported", admit, 0,
            [(part, part[..., :4])] * 2)  # fmt: skip
    refused(TypeError, r"layers\[0\] key_KLH: expected torch.float32 on cpu, got torch.bfloat16",
            admit, 0, [(part.bfloat16(), part)] * 2)  # fmt: skip
    admit(0, [(part, part)] * 2)
    admit(1, [(part, part)] * 2)
    refused(
        ValueError, "prefix: 0 is admitted already; drop it first", admit, 0, [(part, part)] * 2
    )
    refused(ValueError, "prefix: 2 was not admitted", cache.drop, 2)

    slot_B, prefix_B, length_B = rows_of((0, 0, 0), (1, 1, 0), (2, 1, 3))
    refused(ValueError, "slot_B: expected 0 to 2 .* got 3", begin, slot_B + 1, prefix_B, length_B)
    refused(ValueError, "slot_B: a slot is listed twice", begin, slot_B * 0, prefix_B, length_B)
    refused(ValueError, "length_B: .* got 4", begin, slot_B, prefix_B, length_B + 1)
    refused(ValueError, "length_B: .* got -1", begin, slot_B, prefix_B, length_B - 1)
    refused(ValueError, "length_B: expected 3 rows", begin, slot_B, prefix_B, length_B[:2])
    refused(ValueError, "prefix_B: 7 was not", begin, slot_B, prefix_B + 6 * prefix_B, length_B)
    refused(ValueError, "neighbours", begin, slot_B, np.array([1, 0, 1]), length_B)
    refused(ValueError, "slot_B: .*at least one row", begin, slot_B[:0], prefix_B, length_B)
    refused(TypeError, "slot_B: expected int64 .* got int32", begin, slot_B.astype(np.int32),
            prefix_B, length_B)  # fmt: skip
    refused(TypeError, "slot_B: expected int64 .* got list", begin, [0, 1, 2], prefix_B, length_B)
    refused(TypeError, "slot_B: .*meta", begin, torch.zeros(3, device="meta"), prefix_B, length_B)

    query, key = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    good = [0, query, key, key, 0.5]
    refused(RuntimeError, "no step has begun", attend, *good)
    begin(*map(torch.from_numpy, (slot_B, prefix_B, length_B)))
    assert attend(*good).shape == query.shape
    refused(ValueError, "layer: expected 0 to 1, got 2", attend, 2, *good[1:])
    refused(ValueError, "layer: expected 0 to 1, got -1", attend, -1, *good[1:])
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        refused(ValueError, "scale: expected a positive finite", attend, *good[:4], scale)
    refused(ValueError, "query_BNH: .*multiple of 2", attend, 0, query[:, :3], key, key, 0.5)
    refused(ValueError, "query_BNH: .*multiple of 2", attend, 0, query[0], key, key, 0.5)
    refused(ValueError, "query_BNH: expected shape", attend, 0, query[:2], key, key, 0.5)
    refused(ValueError, "value_BKH: .*MLA", attend, 0, query, key, key[..., :4], 0.5)
    refused(TypeError, "key_BKH: .*bfloat16", attend, 0, query, key.bfloat16(), key, 0.5)
    refused(RuntimeError, "query_BNH: attend has no gradient", attend, 0,
            query.requires_grad_(), *good[2:])  # fmt: skip
    cache.drop(0)
    with torch.no_grad():
        refused(RuntimeError, "no step has begun; call begin after admit and drop", attend, *good)


@needs_library
def test_no_memory_is_an_error():
    cache = filled(FP32, 1, 1, {0: 3})
    cache.begin(*rows_of((0, 0, 0)))
    problem = native_library.Decode.from_buffer_copy(cache._decoder._problem)
    problem.heads = 3 << 42
    with pytest.raises(MemoryError, match="out of memory in fastsd_decode"):
        native_library.call("decode", problem)


@linux
@needs_library
@pytest.mark.parametrize("name", SETS)
def test_each_instruction_set(name):
    """Both decoding kernels; the choice is made once a process."""
    if not runs_here(name) or name == instruction_set():
        return  # this process's own
    folder = Path(__file__).parent
    files = [folder / "test_decode.py", folder / "test_calls.py"]
    files.append(folder.parent / "test_packed_linear.py")
    select = "(native or bits or ragged or strides or number) and not torch- and not each_instr"
    found = run(
        name, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select, *map(str, files)
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(found.stdout.rsplit(" passed")[0].split()[-1]) > 50
