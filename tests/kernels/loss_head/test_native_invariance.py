"""Bit-identity of the C++ loss head: a row's results depend on nothing but the row.

Not on how a batch is split, on its order, on rows beside it (counted or not), on chunks, on the
room that the scratch has, and the statistics not on threads. The head's gradient is the same run
after run.
Shape suffixes: T rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

from fastsd_kernels import fused_linear_loss, fused_linear_statistics, native_library
from fastsd_kernels.loss_head.native import sweeps as native
from fastsd_kernels.testing import loss_head_inputs, relative_error

SHAPE = (61, 24, 2100)  # two segments of columns with AVX-512
BY_ROW = ("student_TD", "teacher_TD", "target_T", "divergence_weight_T", "policy_weight_T",
          "old_logprob_T", "entropy_weight_T")  # fmt: skip
SETTINGS = [  # every form that is kept, and the passes in between
    (torch.bfloat16, {"divergence": "forward_kl"}, ("entropy_weight_T",)),
    (torch.bfloat16, {"divergence": "reverse_kl", "clip": 0.2}, ("entropy_weight_T",)),
    (torch.bfloat16, {"divergence": "jsd", "beta": 0.3}, ("entropy_weight_T",)),
    (torch.bfloat16, {"divergence": "sampled_token"}, ("entropy_weight_T",)),
    (torch.bfloat16, {"divergence": "jsd", "softcap": 3.0}, ()),
    (torch.float32, {"divergence": "reverse_kl", "entry_clip": 0.002}, ()),
    (torch.float32, {"divergence": "forward_kl", "top_k": 9}, ()),
    (torch.float32, {"divergence": "jsd", "clip": 0.2}, ()),
]
IDS = [f"{dtype} {options}" for dtype, options, _ in SETTINGS]


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def problem(setting, shape=SHAPE, seed=0) -> tuple[dict, dict]:
    dtype, options, dropped = setting
    x = loss_head_inputs(*shape, dtype, seed)
    return {k: v for k, v in x.items() if k not in dropped}, options


def rows_of(x: dict, options: dict) -> dict[str, torch.Tensor]:
    """What belongs to a row: statistics and d student."""
    student = x["student_TD"].detach().requires_grad_()
    head = x["head_VD"].detach().requires_grad_()
    out = fused_linear_loss(
        **{**x, "student_TD": student, "head_VD": head}, **options, impl="native"
    )
    out.loss.backward()
    found = {k: v for k, v in vars(out).items() if k.endswith("_T") and v is not None}
    return found | {"d student_TD": student.grad}


def picked(x: dict, index_T: torch.Tensor) -> dict:
    return x | {name: x[name].detach()[index_T] for name in BY_ROW if name in x}


def padded(x: dict, random_: random.Random) -> tuple[dict, torch.Tensor]:
    """Rows that do not count among those of x, full of NaN, and where x's rows now are."""
    rows, more = len(x["target_T"]), random_.randint(1, 20)
    where_T = torch.tensor(sorted(random_.sample(range(rows + more), rows)))
    wide = dict(x)
    for name in BY_ROW:
        if name in x:
            value = x[name].detach()
            fill = 0 if name == "target_T" or "weight" in name else torch.nan
            wide[name] = torch.full((rows + more, *value.shape[1:]), fill, dtype=value.dtype)
            wide[name][where_T] = value
    return wide, where_T


def check_split(x: dict, options: dict, whole: dict, random_: random.Random) -> None:
    """A random subset in random order, perhaps padded; the rows it leaves out are another batch."""
    rows = len(x["target_T"])
    order = random_.sample(range(rows), random_.randint(1, rows))
    index_T = torch.tensor(order)
    part, where_T = picked(x, index_T), torch.arange(len(order))
    if random_.random() < 0.5:
        part, where_T = padded(part, random_)
    for name, value in rows_of(part, options).items():
        assert torch.equal(value[where_T], whole[name][index_T]), name


def check_splits(setting, count: int, monkeypatch) -> None:
    random_ = random.Random(count)
    x, options = problem(setting)
    whole = rows_of(x, options)
    one = native_library.scratch_bytes(native_library.LOGITS, 1, 0, SHAPE[2])
    summed = 4 * SHAPE[1] * SHAPE[2]  # the head's fp32 sum over chunks
    sizes = [native.SCRATCH_BYTES, summed + one, summed + 5 * one]
    monkeypatch.setattr(native, "_SMALLEST_CHUNK", 1)
    for _ in range(count):
        monkeypatch.setattr(native, "SCRATCH_BYTES", random_.choice(sizes))
        check_split(x, options, whole, random_)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_random_splits(setting, monkeypatch):
    """200 in all; permutations, padding and chunk sizes with them."""
    check_splits(setting, 25, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_a_thousand_random_splits(setting, monkeypatch):
    check_splits(setting, 1000, monkeypatch)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_threads(setting, threads):
    """Statistics are the same bits on any number of threads; gradients on the same number."""
    x, options = problem(setting)
    one = rows_of(x, options)
    for count in (2, 3, 5):
        threads(count)
        found, again = rows_of(x, options), rows_of(x, options)
        for name, value in one.items():
            assert torch.equal(found[name], again[name]), name
            if name != "d student_TD":
                assert torch.equal(found[name], value), (name, count)
        dtype = x["student_TD"].dtype
        # Another order of the sum over columns: in bf16 it can move the result's rounding.
        budget = 2**-8 if dtype == torch.bfloat16 else 1e-6
        assert relative_error(found["d student_TD"], one["d student_TD"]) <= budget


def whole_gradients(x: dict, options: dict) -> list[torch.Tensor]:
    leaves = {k: x[k].detach().requires_grad_() for k in ("student_TD", "head_VD", "bias_V")}
    fused_linear_loss(**{**x, **leaves}, **options, impl="native").loss.backward()
    return [leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_gradients_are_deterministic(setting, threads, monkeypatch):
    """Two threads, 20 runs, whole and in chunks."""
    x, options = problem(setting)
    threads(2)
    for scratch in (native.SCRATCH_BYTES, 2 * 4 * SHAPE[1] * SHAPE[2]):
        monkeypatch.setattr(native, "SCRATCH_BYTES", scratch)
        monkeypatch.setattr(native, "_SMALLEST_CHUNK", 1)
        first = whole_gradients(x, options)
        for _ in range(20):
            for value, expected in zip(whole_gradients(x, options), first, strict=True):
                assert torch.equal(value, expected)


@pytest.mark.parametrize("count", [1, 2])
def test_statistics_alone_are_those_of_the_loss(count, threads):
    threads(count)
    for setting in SETTINGS:
        x, options = problem(setting)
        options = {k: v for k, v in options.items() if k != "clip"}
        x.pop("old_logprob_T", None)
        named = ("student_TD", "head_VD", "target_T", "teacher_TD", "bias_V")
        alone = fused_linear_statistics(**{k: x[k] for k in named}, **options, impl="native")
        for name, value in rows_of(x, options).items():
            if name != "d student_TD":
                assert torch.equal(getattr(alone, name), value), (name, options)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_rows_computed_again(setting, monkeypatch):
    """Where the head's fp32 sum breaks the bound: the same bits as if they had been kept."""
    x, options = problem(setting)
    whole = rows_of(x, options)
    kept, make = [], native._plan

    def noted(*args):
        kept.append(make(*args).kept)
        return make(*args)

    monkeypatch.setattr(native, "_plan", noted)
    one = native_library.scratch_bytes(native_library.LOGITS, 1, 0, SHAPE[2])
    monkeypatch.setattr(native, "SCRATCH_BYTES", 3 * one)
    found = rows_of(x, options)
    assert kept[-1] < SHAPE[0]
    for name, value in whole.items():
        assert torch.equal(found[name], value), name


MEMORY = """
import sys, torch
from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head.native import sweeps as native
torch.set_num_threads(1)
rows, width, vocabulary, scratch = map(int, sys.argv[1:])
native.SCRATCH_BYTES = scratch
g = torch.Generator().manual_seed(0)
def normal(*shape):
    return torch.randn(*shape, generator=g, dtype=torch.bfloat16)
head = (normal(vocabulary, width) * width**-0.5).requires_grad_()
student, teacher = normal(rows, width).requires_grad_(), normal(rows, width)
target = torch.randint(0, vocabulary, (rows,), generator=g)
def peak():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) << 10
def step(n):
    student.grad = head.grad = None
    loss = fused_linear_loss(
        student[:n], head, target[:n], teacher_TD=teacher[:n], divergence="jsd", impl="native"
    ).loss
    loss.backward()
step(2)  # code and buffers of any call, the gradients themselves
before = peak()
step(rows)
print(peak() - before)
"""


def extra_bytes(*arguments: int) -> int:
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, arguments)], capture_output=True, text=True,
        check=True, env={"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return int(found.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM there")
@pytest.mark.parametrize(
    "width, scratch", [(64, 64 << 20), (320, 16 << 20)], ids=["chunks", "again"]
)
def test_memory_is_bounded(width, scratch):
    """Scratch, and vectors of O(D + V / 2048) a row; no more with four times the rows."""
    vocabulary = 32_000
    few, many = (extra_bytes(rows, width, vocabulary, scratch) for rows in (2048, 8192))
    print(f"extra bytes at T = 2048: {few >> 20} MiB, at T = 8192: {many >> 20} MiB")
    # 8 MiB for the allocator. A row: packed streams, its d student in fp32 and bf16, packings of a
    # group of 256 columns, partial sums by segment (56 B), and torch's own vectors.
    row = 16 * width + 1536 + 80 * (vocabulary // 2048 + 1) + 512
    for rows, extra in ((2048, few), (8192, many)):
        assert extra <= scratch + (8 << 20) + rows * row, rows
    assert many - few <= 6144 * row
