"""bench/gpu_check.py without a GPU: it refuses, a dry run walks its steps and is never a GPU
result, and what fails, hangs or is missing is recorded and decides its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import ROOT

from bench import gpu_check

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_refuses_without_cuda(tmp_path, capsys):
    assert gpu_check.main(["--results", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def fake_sanitizer(folder: Path, status: dict[str, int]) -> str:
    """A PATH whose compute-sanitizer ends with the status given for its tool."""
    cases = "\n".join(f"{tool}) exit {code};;" for tool, code in status.items())
    script = folder / "compute-sanitizer"
    script.write_text(
        '#!/bin/sh\necho "========= ERROR SUMMARY: 3 errors"\ncase "$2" in\n' + cases + "\nesac\n"
    )
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_dry_run_of_gpu_check(tmp_path):
    status = {"memcheck": 0, "racecheck": gpu_check.FOUND_ERRORS, "initcheck": 0}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--dry-run", "--skip-tests", "--shapes",
         "24x16x100", "--rounds", "1", "--results", str(tmp_path / "results")],
        cwd=ROOT, env=os.environ | {"PATH": fake_sanitizer(tmp_path, status)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, "a sanitizer found errors"
    found = json.loads(done.stdout.splitlines()[-1])
    outcomes = {check["name"]: check["outcome"] for check in found["checks"]}
    assert outcomes == {
        "gpu tests": "skipped",
        "reverse_kl 24x16x100": "passed",
        "cross_entropy 24x16x100": "passed",
        "compute-sanitizer memcheck": "passed",
        "compute-sanitizer racecheck": "failed",
        "compute-sanitizer initcheck": "passed",
    }
    path, text_path = sorted((tmp_path / "results").iterdir())
    assert path.name.startswith("dry-run-") and json.loads(path.read_text()) == found
    assert found["dry_run"] is True
    text = text_path.read_text()
    assert text.startswith("# Dry run on a CPU: no GPU figure") and "3 errors" in text
    rows = {(row["op"], row["contestant"]): row for row in found["rows"]}
    assert "seconds" in rows["reverse_kl", "chunked"]
    assert "CUDA" in rows["reverse_kl", "triton"]["why_not"]


def test_small_calls_for_the_sanitizers_run_every_operation():
    assert gpu_check.small_calls(CPU) == 0


def test_children_that_hang_break_or_are_missing():
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert gpu_check.run("x", sleeps, 0.5)[0].outcome == "timed out"
    broken = gpu_check.run("x", [sys.executable, "-c", "raise SystemExit('out of luck')"], 60)[0]
    assert (broken.outcome, broken.detail) == ("failed", "exit 1: out of luck")
    assert gpu_check.run("x", ["no-such-program"], 60)[0].outcome == "not installed"
    args = SimpleNamespace(dry_run=True, rounds=1)
    check, rows = gpu_check.run_cell(args, "2x3x4", "jsd", time.monotonic() + 5)
    assert check.outcome == "not reached" and rows == []


def test_gpu_check_fails_if_our_kernel_has_no_time():
    passed = gpu_check.Check("gpu tests", "passed", "")
    row = {"contestant": "triton", "why_not": "not reached"}
    real, dry = SimpleNamespace(dry_run=False), SimpleNamespace(dry_run=True)
    assert gpu_check.exit_status(real, [passed], [row]) == 1
    assert gpu_check.exit_status(dry, [passed], [row]) == 0
    assert gpu_check.exit_status(real, [passed], [row | {"seconds": 1.0}]) == 0
    late = gpu_check.Check("jsd", "timed out", "")
    assert gpu_check.exit_status(real, [passed, late], []) == 1
