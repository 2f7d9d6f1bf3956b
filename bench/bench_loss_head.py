"""The loss head against its floor and the best public code, all in one run.

    python -m bench.bench_loss_head                     # about ten minutes on a quiet machine
    python -m bench.bench_loss_head --complete --json figures.json     # peers in every operation
    python -m bench.bench_loss_head --scaling           # time against T, D and V with linear fits
    python -m bench.bench_loss_head --accuracy          # errors in bf16 and fp32, all contestants

The tests of the kernels run first, and if one fails no figure is printed. The floor is the bare
GEMMs of the same shape in the same rounds: 4 x 2 T D V operations for a distillation step, 2 for
the statistics. Each thread count gets its own process. `error` is the relative L2 error against the
definition in fp64 on the first rows of the same inputs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.common import measure
from bench.common.cells import Cell, measure_cell, measure_errors
from bench.common.contestants import factories
from bench.common.problem import OPERATIONS, parse_shape
from bench.common.tables import cell_lines, error_lines, peak_text, reason_lines, speedup_lines
from fastsd_kernels.loss_head import implementation_name

SCRIPT = "bench/bench_loss_head.py"
SHAPES = "512x576x49152,512x1024x151936,128x1024x32000,2048x576x49152"
OPS = "reverse_kl,forward_kl,jsd,statistics"
CLOCK = "ms: process CPU time summed over threads; GFLOP/s: per thread, of that time"
MEMORY = "peak MiB: rise of the resident set in one call, less the gradients it returns"
# --scaling: one axis at a time varies by these factors about this shape.
BASE, SCALES = (512, 576, 49152), (0.25, 0.5, 1, 2)
ACCURACY_SHAPE = "128x1024x32000"
NAMES = tuple(factories(torch.device("cpu"), torch.bfloat16))
ACCURACY_SETTINGS = ((torch.bfloat16, 1.0), (torch.float32, 1.0), (torch.float32, 8.0))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(NAMES)
    p.add_argument("--shapes", default=SHAPES, help=f"TxDxV,... (default {SHAPES})")
    p.add_argument("--ops", default=OPS, help=f"of {','.join(OPERATIONS)} (default {OPS})")
    p.add_argument("--impls", help=f"of {names}; default: all, but after the first op ours")
    p.add_argument("--complete", action="store_true", help="every contestant in every operation")
    p.add_argument("--threads", help="each in its own process (default 1,2; modes below: 1)")
    p.add_argument("--rounds", type=int, default=5, help="3 for those above 1 s, 1 above 5 s")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--json", type=Path, help="also write the results here")
    p.add_argument("--skip-tests", action="store_true", help="marks the results as untested")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--scaling", action="store_true")
    mode.add_argument("--accuracy", action="store_true")
    p.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return p


def parse(arguments: list[str]) -> argparse.Namespace:
    """The arguments; ends with a message where a shape, an operation or a contestant is unknown."""
    p = parser()
    args = p.parse_args(arguments)
    for option, allowed in (("ops", OPERATIONS), ("impls", NAMES)):
        for name in (getattr(args, option) or allowed[0]).split(","):
            if name not in allowed:
                p.error(f"--{option}: expected some of {','.join(allowed)}, got {name!r}")
    try:
        shapes = [parse_shape(text) for text in args.shapes.split(",")]
    except ValueError as error:
        p.error(f"--shapes: {error}")
    if len(shapes) > 1 and args.shapes != SHAPES and (args.scaling or args.accuracy):
        p.error("--shapes: --scaling and --accuracy take one")
    return args


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.worker:
        args.worker.write_text(json.dumps(work(args)))
        return 0
    tests = "skipped" if args.skip_tests else run_tests()
    if tests == "failed":
        print("the kernels' tests fail: nothing was measured", file=sys.stderr)
        return 1
    mode = "scaling" if args.scaling else "accuracy" if args.accuracy else "time"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in (args.threads or ("1,2" if mode == "time" else "1")).split(","):
            rows += in_process(arguments, int(threads), Path(folder))
    facts = {"mode": mode, "tests": tests, "clock": CLOCK, "memory": MEMORY}
    found = measure.record(SCRIPT, torch.device("cpu"), rows, arguments, **facts)
    measure.write(found, args.json)
    return int(any(row.get("failed") for row in rows))


def run_tests() -> str:
    """ "passed" or "failed"; pytest's own output is left on the terminal."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-x"]
    done = subprocess.run(command, cwd=measure.ROOT)
    return "passed" if done.returncode == 0 else "failed"


def in_process(arguments: list[str], threads: int, folder: Path) -> list[dict]:
    """The rows of one thread count; compilation starts from an empty cache."""
    out = folder / f"{threads}.json"
    command = [sys.executable, "-m", "bench.bench_loss_head", *arguments]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{threads}"),
    }
    command += ["--worker", str(out), "--threads", str(threads)]
    done = subprocess.run(command, cwd=measure.ROOT, env=environment)
    if done.returncode:
        sys.exit(f"the process with {threads} thread(s) ended with status {done.returncode}")
    return json.loads(out.read_text())


def work(args: argparse.Namespace) -> list[dict]:
    """The rows of this process, which has one thread count."""
    threads = int(args.threads)
    torch.set_num_threads(threads)
    measure.keep_freed_memory(True)
    print(f"{threads} thread(s); {CLOCK}; {MEMORY}\n", flush=True)
    run = scaling if args.scaling else accuracy if args.accuracy else times
    return [row | {"threads": threads} for row in run(args)]


def times(args: argparse.Namespace) -> list[dict]:
    """All cells; the reason why a contestant does not run is printed once."""
    rows, said, dtype = [], set(), getattr(torch, args.dtype)
    for shape in map(parse_shape, args.shapes.split(",")):
        for op in args.ops.split(","):
            cell = Cell(shape, op, dtype, torch.device("cpu"), args.rounds)
            rows += (found := measure_cell(cell, contestants(args, op)))
            reasons = news(reason_lines(found), said)
            lines = [*cell_lines(cell, found), *speedup_lines(found), *reasons, ""]
            print("\n".join(lines), flush=True)
    return rows


def contestants(args: argparse.Namespace, op: str) -> list[str]:
    """Who takes part in `op`."""
    if args.impls:
        return args.impls.split(",")
    if args.complete or args.accuracy or op == args.ops.split(",")[0]:
        return list(NAMES)
    return [implementation_name("auto", "cpu", getattr(torch, args.dtype))]


def news(lines: list[str], said: set[str]) -> list[str]:
    """Those of `lines` not in `said`, which they join."""
    found = [line for line in lines if line not in said]
    said.update(found)
    return found


def scaling(args: argparse.Namespace) -> list[dict]:
    """Our implementation's time and memory along each axis, and the line through them."""
    base = parse_shape(args.shapes) if args.shapes != SHAPES else BASE
    dtype = getattr(torch, args.dtype)
    name = args.impls or implementation_name("auto", "cpu", dtype)
    rows = []
    for axis, letter in enumerate("TDV"):
        points = []
        for factor in SCALES:
            shape = tuple(int(n * factor) if i == axis else n for i, n in enumerate(base))
            cpu = torch.device("cpu")
            cell = Cell(shape, "reverse_kl", dtype, cpu, args.rounds, with_errors=False)
            points += measure_cell(cell, [name])[1:]
            if "why_not" in points[-1]:
                sys.exit(f"--scaling: {name} does not run here: {points[-1]['why_not']}")
        rows += points
        xs = [float(row["shape"][axis]) for row in points]
        start, slope, r2 = measure.linear_fit(xs, [row["seconds"] for row in points])
        print(f"{letter} from {xs[0]:.0f} to {xs[-1]:.0f}, {points[0]['title']}, reverse_kl:")
        for x, row in zip(xs, points, strict=True):
            print(f"  {x:7.0f}  {1e3 * row['seconds']:8.1f} ms  {peak_text(row)} MiB")
        print(f"  ms = {1e3 * start:.1f} + {1e3 * slope:.4g} {letter}, R^2 {r2:.5f}\n", flush=True)
    return rows


def accuracy(args: argparse.Namespace) -> list[dict]:
    """Errors of every contestant by type, logit scale and operation."""
    shape = parse_shape(args.shapes if args.shapes != SHAPES else ACCURACY_SHAPE)
    rows, said = [], set()
    for dtype, scale in ACCURACY_SETTINGS:
        for op in args.ops.split(","):
            cell = Cell(shape, op, dtype, torch.device("cpu"), logit_scale=scale)
            rows += (found := measure_errors(cell, contestants(args, op)))
            head = f"{op}, {found[0]['dtype']}, logit scale {scale:g}, T {shape[0]} D {shape[1]}"
            lines = [*error_lines(found), *news(reason_lines(found), said), ""]
            print("\n".join([f"{head} V {shape[2]}", *lines]), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
