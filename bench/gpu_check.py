"""Everything that needs a GPU, in one run of less than eight minutes: `make gpu-check`.

    python -m bench.gpu_check
    python -m bench.gpu_check --dry-run --shapes 64x32x500      # its logic, on a CPU

First the tests marked gpu; if they fail nothing is timed. Then the loss head against its floor and
the public code, a process for each operation and shape, because an error on a device ends with the
process. Last compute-sanitizer's memcheck, racecheck and initcheck on small calls. Each step has a
time limit, and what was not reached, not installed or out of memory is recorded with the reason.

The results go to one dated file, bench/results/gpu-<date>-<GPU>.json, and a readable one beside it.
A dry run says so in its file's name, its heading and its record: its figures mean nothing.
Exit status: 0; 1 if a test, a sanitizer or one of our implementations failed; 2 without CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.common import measure
from bench.common.cells import Cell, measure_cell
from bench.common.problem import make_problem, ours, parse_shape
from bench.common.tables import cell_lines, reason_lines, speedup_lines

SCRIPT = "bench/gpu_check.py"
SHAPES = "8192x4096x151936,16384x2048x151936"
# Contestants by operation, the most wanted first: time may run out.
PLAN = {
    "reverse_kl": "triton,liger-triton,trl,compile,eager,liger,chunked,eager-fp32",
    "statistics": "triton,trl,chunked",
    "cross_entropy": "triton,liger-triton,cce,compile",
    "jsd": "triton,liger-triton,trl",
    "forward_kl": "triton",
}
# A dry run exercises every branch and waits for no compiler.
DRY_PLAN = {"reverse_kl": "triton,chunked,eager", "cross_entropy": "chunked,cce"}
TOTAL_S, TESTS_S, CELL_S, SANITIZER_S = 460, 150, 75, 25
SANITIZERS = ("memcheck", "racecheck", "initcheck")
FOUND_ERRORS = 99  # compute-sanitizer's exit status for them, of our choice


@dataclass(frozen=True)
class Check:
    """outcome: passed, failed, timed out, skipped, not installed or not reached."""

    name: str
    outcome: str
    detail: str
    seconds: float = 0.0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shapes", default=SHAPES, help=f"TxDxV,... (default {SHAPES})")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--results", type=Path, default=measure.ROOT / "bench" / "results")
    p.add_argument("--dry-run", action="store_true", help="on a CPU; never a GPU result")
    p.add_argument("--skip-tests", action="store_true", help="recorded as such")
    p.add_argument("--cell", nargs=3, metavar=("SHAPE", "OP", "OUT"), help=argparse.SUPPRESS)
    p.add_argument("--small-calls", action="store_true", help=argparse.SUPPRESS)
    return p


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; nothing was checked", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.dry_run else "cuda")
    if args.cell:
        return one_cell(args, device)
    if args.small_calls:
        return small_calls(device)
    deadline = time.monotonic() + TOTAL_S
    checks, rows = [run_tests(args)], []
    if checks[0].outcome in ("passed", "skipped"):
        for op in DRY_PLAN if args.dry_run else PLAN:
            for shape in args.shapes.split(","):
                check, found = run_cell(args, shape, op, deadline - SANITIZER_S * len(SANITIZERS))
                checks.append(check)
                rows += found
        checks += [run_sanitizer(args, tool, deadline) for tool in SANITIZERS]
    facts = {"dry_run": args.dry_run, "checks": [asdict(check) for check in checks]}
    found = measure.record(SCRIPT, device, rows, arguments, **facts)
    path = results_path(args, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(report(found, checks, device))
    print(f"written: {path} and {path.with_suffix('.md').name}", flush=True)
    measure.write(found, path)
    return exit_status(args, checks, rows)


def exit_status(args: argparse.Namespace, checks: list[Check], rows: list[dict]) -> int:
    """1 if a check failed or, on a GPU, our implementation for it has a row without a time."""
    bad = any(check.outcome in ("failed", "timed out") for check in checks)
    bad |= any(row.get("failed") for row in rows)
    untimed = any(row["contestant"] == "triton" and "seconds" not in row for row in rows)
    return int(bad or (untimed and not args.dry_run))


def run_tests(args: argparse.Namespace) -> Check:
    """The tests marked gpu; a dry run only collects them."""
    if args.skip_tests:
        return Check("gpu tests", "skipped", "--skip-tests")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    if args.dry_run:
        command.append("--collect-only")
    check, text = run(f"gpu tests{' (collected)' * args.dry_run}", command, TESTS_S)
    summary = text.strip().splitlines()[-1:] or [""]
    return Check(check.name, check.outcome, check.detail or summary[0], check.seconds)


def run_cell(
    args: argparse.Namespace, shape: str, op: str, deadline: float
) -> tuple[Check, list[dict]]:
    name = f"{op} {shape}"
    left = deadline - time.monotonic()
    if left < 10:
        return Check(name, "not reached", "the time budget was spent"), []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [*itself(args), "--rounds", str(args.rounds), "--cell", shape, op, str(out)]
        check, text = run(name, command, min(CELL_S, left))
        if check.outcome != "passed":
            return check, []
        print(text, flush=True)
        return check, json.loads(out.read_text())


def one_cell(args: argparse.Namespace, device: torch.device) -> int:
    """In a process of its own; contestants stop starting at two thirds of the limit."""
    shape, op, out = args.cell
    torch.set_num_threads(1)  # a dry run's figures mean nothing, but it should not crawl
    started = time.monotonic()
    until = started + CELL_S * 2 / 3
    cell = Cell(parse_shape(shape), op, torch.bfloat16, device, args.rounds, deadline=until)
    plan = DRY_PLAN if args.dry_run else PLAN
    rows = measure_cell(cell, plan[op].split(","))
    print("\n".join([*cell_lines(cell, rows), *speedup_lines(rows), *reason_lines(rows)]))
    Path(out).write_text(json.dumps(rows))
    return 0


def run_sanitizer(args: argparse.Namespace, tool: str, deadline: float) -> Check:
    name = f"compute-sanitizer {tool}"
    left = min(SANITIZER_S, deadline - time.monotonic())
    if left < 5:
        return Check(name, "not reached", "the time budget was spent")
    options = ["--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
    command = ["compute-sanitizer", *options, *itself(args), "--small-calls"]
    check, text = run(name, command, left)
    summary = re.findall(r"[A-Z]+ SUMMARY: .*", text)
    return Check(name, check.outcome, check.detail or " ".join(summary), check.seconds)


def small_calls(device: torch.device) -> int:
    """What the sanitizers watch: each operation once, ragged, in our fastest implementation."""
    impl = "chunked" if device.type == "cpu" else "triton"
    problem = make_problem((37, 48, 1001), torch.bfloat16, device)
    contestant = ours(impl, device, torch.bfloat16)
    for op in PLAN:
        contestant.runner(problem, op)()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


def itself(args: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_check", *(["--dry-run"] if args.dry_run else [])]


def run(name: str, command: list[str], limit: float) -> tuple[Check, str]:
    """One child process: how it ended, its last line if that was not well, and all it printed."""
    print(f"... {name}", flush=True)
    # Without torch's caching allocator a sanitizer sees each tensor's true bounds.
    environment = os.environ | (
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command[0] == "compute-sanitizer" else {}
    )
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=measure.ROOT, env=environment, timeout=limit, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except FileNotFoundError:
        return Check(name, "not installed", f"no {command[0]} on the PATH"), ""
    except subprocess.TimeoutExpired:
        return Check(name, "timed out", f"after {limit:.0f} s", limit), ""
    seconds = time.monotonic() - start
    if done.returncode == 0:
        return Check(name, "passed", "", seconds), done.stdout
    last = done.stdout.strip().splitlines()[-1:] or [""]
    return Check(name, "failed", f"exit {done.returncode}: {last[0]}", seconds), done.stdout


def results_path(args: argparse.Namespace, found: dict) -> Path:
    kind = "dry-run" if args.dry_run else "gpu"
    device = re.sub(r"[^a-z0-9]+", "-", found["hardware"].split(",")[0].lower()).strip("-")
    return args.results / f"{kind}-{found['date'][:10]}-{device}.json"


def report(found: dict, checks: list[Check], device: torch.device) -> str:
    """The record for a reader, in Markdown."""
    title = "Dry run on a CPU: no GPU figure" if found["dry_run"] else "GPU check"
    versions = ", ".join(f"{k} {v or 'not installed'}" for k, v in found["versions"].items())
    lines = [f"# {title}", "", f"`{found['script']}`, commit {found['commit']}, {found['date']}"]
    lines += [f"on {found['hardware']}; {versions}.", ""]
    if found["dry_run"]:
        lines += ["The figures below exercise the script. They say nothing about any GPU.", ""]
    lines += ["| check | outcome | s | |", "|---|---|---|---|"]
    lines += [f"| {c.name} | {c.outcome} | {c.seconds:.0f} | {c.detail} |" for c in checks]
    cells: dict[tuple, list[dict]] = {}
    for row in found["rows"]:
        cells.setdefault((*row["shape"], row["op"]), []).append(row)
    for (*shape, op), rows in cells.items():
        cell = Cell(tuple(shape), op, torch.bfloat16, device)
        lines += ["", "```", *cell_lines(cell, rows), *speedup_lines(rows), *reason_lines(rows)]
        lines += ["```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
