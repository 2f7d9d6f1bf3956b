"""The benches measure what they say: meters against known work, contestants against fp64, what
does not run is recorded, and nothing is timed on a red gate."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from places import ROOT

from bench.common import cells, measure
from bench.common.contestants import factories
from bench.common.problem import (
    OPERATIONS,
    Contestant,
    Unavailable,
    exact,
    floor,
    flop,
    least_bytes,
    make_problem,
    parse_shape,
)
from fastsd_kernels.testing import BF16_GRADIENT_ERROR, FP32_ERROR_AT_SCALE_8, WorkMeter

CPU = torch.device("cpu")
SHAPE = (21, 16, 130)
MEBIBYTE = 1 << 20


def cell(op="reverse_kl", dtype=torch.bfloat16, **changes):
    return cells.Cell(SHAPE, op, dtype, CPU, **{"rounds": 2, **changes})


def printed_alone(code: str) -> list[int]:
    """What `code` prints in a process of its own, where the allocator's state is its own too."""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(word) for word in found.stdout.split()]


PEAKS = """
import torch
from bench.common import measure

def run():
    held = torch.ones(20 * 2**20 // 4)
    temporary = torch.ones(90 * 2**20 // 4)
    del temporary
    return held

for _ in range(2):
    peak, held = measure.peak_memory(run, torch.device("cpu"))
    print(peak, held.nbytes)
    del held
print(measure.peak_memory(lambda: None, torch.device("cpu"))[0])
"""


def test_peak_memory_sees_temporaries_and_what_is_returned():
    """Memory kept from the first call must not hide the second's."""
    *calls, nothing = printed_alone(PEAKS)
    for peak, held in (calls[:2], calls[2:]):
        assert held == 20 * MEBIBYTE
        assert peak == pytest.approx(110 * MEBIBYTE, abs=2 * MEBIBYTE)
    assert nothing < MEBIBYTE


FAULTS = """
import resource, torch
from bench.common import measure

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cold = faults()
measure.hold_pages(64 * 2**20, torch.device("cpu"))
print(cold, faults())
"""


def test_rounds_do_not_pay_for_page_faults():
    cold, warm = printed_alone(FAULTS)
    # Where large pages are always on, cold is a few dozen and there is nothing to hold.
    assert warm <= min(cold, 100), "12,288 pages of 4096 bytes if the memory had gone back"


def test_rounds_interleave_and_are_summarised(monkeypatch):
    calls, clock = [], iter([(3.0, 4.0), (9.0, 9.0), (1.0, 2.0), (2.0, 3.0)])
    monkeypatch.setattr(measure, "time_once", lambda run, device: (run(), next(clock))[1])
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = measure.interleave(runs, {"a": 3, "b": 1}, CPU)
    assert calls == ["a", "b", "a", "a"]
    assert found["a"] == measure.Timing(seconds=2.0, least=1.0, most=3.0, wall=3.0, rounds=3)
    assert found["b"].rounds == 1


def test_process_time_counts_work_and_not_sleep():
    seconds, wall = measure.time_once(lambda: time.sleep(0.2), CPU)
    assert seconds < 0.1 and wall >= 0.2


def test_slow_contestants_get_fewer_rounds():
    assert [measure.rounds_for(s, 7) for s in (0.1, 1, 2, 5, 6)] == [7, 7, 3, 3, 1]
    assert measure.rounds_for(2, 2) == 2


def test_linear_fit():
    start, slope, r2 = measure.linear_fit([1, 2, 4], [5, 7, 11])
    assert (start, slope, r2) == pytest.approx((3, 2, 1))
    assert measure.linear_fit([1, 2, 3, 4], [1, 4, 1, 4])[2] == pytest.approx(0.2)


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_floor_is_the_gemms_that_are_counted(op):
    run = floor(make_problem(SHAPE, torch.bfloat16, CPU), op)
    with WorkMeter() as meter:
        run()
    assert meter.product_flop == flop(op, SHAPE)
    assert meter.products == {"statistics": 2, "cross_entropy": 3}.get(op, 4)


def test_least_bytes():
    t, d, v = SHAPE
    assert least_bytes("jsd", SHAPE, 2) == 2 * (2 * t * d + v * d + t * d + v * d)
    assert least_bytes("statistics", SHAPE, 2) == 2 * (2 * t * d + v * d)
    assert least_bytes("cross_entropy", SHAPE, 2) == 2 * (t * d + v * d + t * d + v * d)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", ["native", "chunked", "eager", "eager-fp32", "trl"])
def test_contestants_compute_the_same_thing(name, op):
    """In fp32, where every contestant is accurate, all agree with fp64: same loss, same sums."""
    [row] = cells.measure_errors(cell(op, torch.float32), [name])
    if "why_not" in row:
        pytest.skip(row["why_not"])
    assert row["errors"] and max(row["errors"].values()) <= FP32_ERROR_AT_SCALE_8


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", ["compile", "compile-fp32", "liger"])
def test_compiled_contestants_compute_the_same_thing(name, op):
    test_contestants_compute_the_same_thing(name, op)


def test_a_mean_is_compared_as_a_sum(monkeypatch):
    eager = factories(CPU, torch.float32)["eager"]()
    rows = SHAPE[0]
    mean = Contestant("mean", OPERATIONS, lambda p, op: eager.loss(p, op) / rows, mean=True)
    problem = make_problem(SHAPE, torch.float32, CPU)
    found = cells.errors(mean, problem, "jsd", exact(problem, "jsd"))
    assert max(found.values()) <= FP32_ERROR_AT_SCALE_8


@pytest.mark.parametrize("name, reason", [("triton", "CUDA"), ("liger-triton", "CUDA")])
def test_who_cannot_run_on_a_cpu_says_why(name, reason):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(Unavailable, match=reason):
        factories(CPU, torch.bfloat16)[name]()


def test_a_cell_has_times_memory_and_errors():
    rows = {row["contestant"]: row for row in cells.measure_cell(cell(), ["chunked", "eager"])}
    assert list(rows) == ["floor", "chunked", "eager"]
    assert rows["floor"]["x_floor"] == 1
    for row in rows.values():
        assert row["shape"] == list(SHAPE) and row["op"] == "reverse_kl"
        assert row["seconds"] > 0 and row["least"] <= row["seconds"] <= row["most"]
    for name in ("chunked", "eager"):
        assert rows[name]["x_floor"] == rows[name]["seconds"] / rows["floor"]["seconds"]
        assert rows[name]["returned_bytes"] == 4 + 2 * (SHAPE[0] + SHAPE[2]) * SHAPE[1]
        assert rows[name]["peak_bytes"] >= 0
    assert rows["chunked"]["errors"]["d_head"] <= BF16_GRADIENT_ERROR
    assert rows["eager"]["errors"]["d_head"] > rows["chunked"]["errors"]["d_head"]


def replace_factories(monkeypatch, **changed):
    def found(device, dtype):
        return {**factories(device, dtype), **changed}

    monkeypatch.setattr(cells, "factories", found)


def test_a_contestant_that_breaks_is_recorded_and_the_others_run(monkeypatch):
    def breaks(error):
        def loss(problem, op):
            raise error

        return lambda: Contestant("broken", OPERATIONS, loss)

    replace_factories(
        monkeypatch,
        trl=breaks(TypeError("no such argument\nsecond line")),
        native=breaks(torch.OutOfMemoryError("tried to allocate")),
    )
    rows = cells.measure_cell(cell(), ["trl", "native", "chunked"])
    floor_row, trl, native, chunked = rows
    assert trl["why_not"] == "TypeError: no such argument" and not trl["failed"]
    assert native["why_not"] == "out of memory" and native["failed"]
    assert "seconds" in chunked and "seconds" in floor_row


def test_wrong_gradients_lose_their_time(monkeypatch):
    right = factories(CPU, torch.bfloat16)["eager-fp32"]()
    wrong = Contestant("wrong", OPERATIONS, lambda p, op: 1.01 * right.loss(p, op))
    replace_factories(monkeypatch, chunked=lambda: wrong, trl=lambda: wrong)
    _, chunked, trl = cells.measure_cell(cell(), ["chunked", "trl"])
    assert chunked["failed"] and "wrong gradients" in chunked["why_not"]
    assert "seconds" not in chunked and chunked["errors"]["d_head"] > BF16_GRADIENT_ERROR
    assert "seconds" in trl, "a peer keeps its time: its error stands beside it"


def test_after_the_deadline_nothing_starts():
    floor_row, row = cells.measure_cell(cell(deadline=time.monotonic() - 1), ["chunked"])
    assert "time budget" in row["why_not"] and "seconds" not in row and "seconds" in floor_row


def test_shapes():
    assert parse_shape("512x576x49152") == (512, 576, 49152)
    for text in ("5x6", "5x6x0", "axbxc"):
        with pytest.raises(ValueError, match="TxDxV"):
            parse_shape(text)


@pytest.mark.gpu
def test_cuda_meters():
    device = torch.device("cuda")

    def run():
        temporary = torch.ones(8 * MEBIBYTE, dtype=torch.uint8, device=device)
        return temporary[:1].clone()

    peak, _ = measure.peak_memory(run, device)
    assert 8 * MEBIBYTE <= peak < 9 * MEBIBYTE
    assert 0 < measure.time_once(run, device)[0] <= measure.time_once(run, device)[1] * 2
