"""One cell of a bench: all contestants on one operation, shape and type, and the rows it gives.

Order within a cell: each contestant's compilation where it compiles and one call that warms it up
and meters its memory; the interleaved rounds with the floor; the error of each on the first rows. A
contestant of ours whose gradients miss their budget loses its time. One that does not run keeps its
row, with the reason in `why_not`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bench.common import measure
from bench.common.contestants import factories
from bench.common.problem import (
    OURS,
    Contestant,
    Problem,
    Results,
    Shape,
    Unavailable,
    exact,
    floor,
    flop,
    make_problem,
)
from fastsd_kernels.testing import BF16_GRADIENT_ERROR, FP32_ERROR_AT_SCALE_8, relative_error

ERROR_ROWS = 128
TINY = (2, 8, 16)
_BUDGETS = {torch.bfloat16: BF16_GRADIENT_ERROR, torch.float32: FP32_ERROR_AT_SCALE_8}


@dataclass(frozen=True)
class Cell:
    """What is measured. `deadline`: no contestant starts after this time.monotonic()."""

    shape: Shape
    op: str
    dtype: torch.dtype
    device: torch.device
    rounds: int = 5
    logit_scale: float = 1.0
    with_errors: bool = True
    deadline: float = float("inf")

    def facts(self) -> dict:
        name = str(self.dtype).removeprefix("torch.")
        return {"op": self.op, "shape": list(self.shape), "dtype": name}

    def problem(self) -> Problem:
        return make_problem(self.shape, self.dtype, self.device, self.logit_scale)


def measure_cell(cell: Cell, names: list[str]) -> list[dict]:
    """Rows of the floor and of every named contestant, in that order."""
    problem = cell.problem()
    runs = {"floor": floor(problem, cell.op)}
    seconds = measure.time_once(runs["floor"], cell.device)[1]
    rows: dict[str, dict] = {"floor": {"contestant": "floor", "title": "bare GEMMs (the floor)"}}
    rounds = {"floor": measure.rounds_for(seconds, cell.rounds)}
    contestants = {}
    torch._dynamo.reset()
    for name in names:
        rows[name], contestants[name] = _warm_up(cell, name, problem)
        if contestants[name] is not None:
            runs[name] = contestants[name].runner(problem, cell.op)
            rounds[name] = measure.rounds_for(rows[name]["warm_up_seconds"], cell.rounds)
    largest = max(row.get("rise_bytes", 0) for row in rows.values())
    measure.hold_pages(largest + largest // 8, cell.device)
    rounds["floor"] = max(rounds.values())  # beside everyone in every round
    timings = measure.interleave(runs, rounds, cell.device)
    for name, timing in timings.items():
        rows[name] |= measure.timing_fields(timing) | _ratios(cell, timing, timings["floor"])
    if cell.with_errors:
        _add_errors(cell, problem, rows, contestants)
    return [cell.facts() | row for row in rows.values()]


def measure_errors(cell: Cell, names: list[str]) -> list[dict]:
    """Rows with errors only, without times."""
    rows, contestants = {}, {}
    for name in names:
        rows[name] = {"contestant": name, "title": name, "logit_scale": cell.logit_scale}
        try:
            contestants[name] = factories(cell.device, cell.dtype)[name]()
            rows[name]["title"] = contestants[name].title
        except Unavailable as reason:
            rows[name]["why_not"] = str(reason)
    _add_errors(cell, cell.problem(), rows, contestants)
    return [cell.facts() | row for row in rows.values()]


def _warm_up(cell: Cell, name: str, problem: Problem) -> tuple[dict, Contestant | None]:
    """A row with compilation, warm-up and memory; with the reason and None if it does not run."""
    row: dict = {"contestant": name, "title": name}
    if time.monotonic() > cell.deadline:
        return row | {"why_not": "not reached: the time budget was spent"}, None
    try:
        contestant = factories(cell.device, cell.dtype)[name]()
        row["title"] = contestant.title
        run = contestant.runner(problem, cell.op)
        if contestant.compiles:
            row["first_call_seconds"] = measure.time_once(run, cell.device)[1]
        else:  # brings its code into memory, which is not the call's
            contestant.runner(make_problem(TINY, cell.dtype, cell.device), cell.op)()
        start = time.perf_counter()
        peak, results = measure.peak_memory(run, cell.device)
        row["warm_up_seconds"] = time.perf_counter() - start
        if peak is not None:
            row |= {"rise_bytes": peak, "returned_bytes": _bytes(results)}
            row["peak_bytes"] = max(0, peak - row["returned_bytes"])
        return row, contestant
    except Exception as error:  # kept in the row: a peer that breaks must not end the bench
        return row | _failure(name, error), None


def _add_errors(cell: Cell, problem: Problem, rows: dict, contestants: dict) -> None:
    """Errors of all who ran, after the rounds: another size would disturb compiled contestants."""
    few = problem.rows(ERROR_ROWS)
    wanted = exact(few, cell.op)
    for name, contestant in contestants.items():
        if contestant is None or (contestant.compiles and problem.shape != few.shape):
            continue  # another compilation: `measure_errors` on a shape of few rows has them all
        try:
            rows[name]["errors"] = errors(contestant, few, cell.op, wanted)
            _check(cell, name, rows[name]["errors"])
        except Exception as error:  # kept in the row, as above
            kept = ("contestant", "title", "errors")
            rows[name] = {key: rows[name][key] for key in kept if key in rows[name]}
            rows[name] |= _failure(name, error)


def errors(contestant: Contestant, few: Problem, op: str, wanted: Results) -> dict[str, float]:
    """Relative L2 error of each result of `op` on the problem `few`, against `wanted` in fp64."""
    torch._dynamo.reset()  # or a second size would be compiled with dynamic shapes
    scale = few.shape[0] if contestant.mean and op != "statistics" else 1
    found = contestant.runner(few, op)()
    return {name: relative_error(x.double() * scale, wanted[name]) for name, x in found.items()}


def _check(cell: Cell, name: str, found: dict[str, float]) -> None:
    worst = max((e for key, e in found.items() if key.startswith("d_")), default=0.0)
    if name in OURS and not worst <= _BUDGETS[cell.dtype]:
        raise ArithmeticError(f"wrong gradients, no time: {found}")


def _failure(name: str, error: Exception) -> dict:
    if isinstance(error, Unavailable):
        return {"why_not": str(error)}
    if isinstance(error, torch.OutOfMemoryError):
        return {"why_not": "out of memory", "failed": name in OURS}
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return {"why_not": text, "failed": name in OURS}


def _bytes(results: Results) -> int:
    return sum(x.nbytes for x in results.values())


def _ratios(cell: Cell, timing: measure.Timing, floor_timing: measure.Timing) -> dict:
    return {
        "x_floor": timing.seconds / floor_timing.seconds,
        "gflop_per_second": flop(cell.op, cell.shape) / timing.seconds / 1e9,
    }
