"""impl="triton" where no GPU is: the interpreter's tests in a process of their own, and refusals.

Triton decides between interpreter and compiler when kernels are imported, so the tests in
interpreted/ run in one subprocess with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

pytest.importorskip("triton")

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head.triton import fused
from fastsd_kernels.testing import loss_head_inputs

FILES = tuple(f"test_fused{part}.py" for part in ("", "_rows", "_memory", "_low_memory"))


def run_interpreted(marker: str, cache: Path) -> None:
    folder = Path(__file__).parent / "interpreted"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider",
         *(str(folder / name) for name in FILES)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache)},
    )  # fmt: skip
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0 and "skipped" not in done.stdout.splitlines()[-1]


def test_under_the_interpreter(tmp_path):
    run_interpreted("not slow and not gpu", tmp_path)


@pytest.mark.slow
def test_under_the_interpreter_at_length(tmp_path):
    run_interpreted("slow", tmp_path)


def test_refuses_what_it_cannot_run():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "needs a CUDA device, got cpu" in fused.why_not(cpu, torch.float32)
    assert "fp64" in fused.why_not(cuda, torch.float64)
    assert fused.why_not(cuda, torch.bfloat16) is None


def test_an_explicit_choice_does_not_fall_back():
    with pytest.raises(RuntimeError, match="impl='triton' is not available.*CUDA"):
        fused_linear_loss(**loss_head_inputs(3, 4, 5, torch.float32), impl="triton")


def test_chunks_fit_the_scratch_and_start_aligned():
    cpu = torch.device("cpu")
    for rows in (1, 15, 16, 17, 1000, 8192, 70_001):
        for vocabulary in (64, 32_000, 151_936, 262_144):
            bytes_per_row = 10 * vocabulary
            chunk = fused._rows_per_chunk(rows, bytes_per_row, cpu)
            most = fused.SCRATCH_BYTES // bytes_per_row
            assert 1 <= chunk <= most
            assert chunk % 16 == 0
            assert -(-rows // chunk) <= -(-rows // (most - most % 16))
    assert fused._rows_per_chunk(5, 1 << 40, cpu) == 1
