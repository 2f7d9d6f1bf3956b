"""Processes with another instruction set of the C++ library: it is chosen once a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

linux = pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
SETS = ("avx512_bf16", "avx512", "avx2", "scalar")

PROBE = """
import torch
from fastsd_kernels.loss_head import implementation_choice
from fastsd_kernels.native_library import instruction_set
try:
    print(implementation_choice("native", "cpu", torch.float32)[0], instruction_set())
except RuntimeError as error:
    print(error)
"""


def run(instruction_set: str, *command: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "tests" / "helpers")])
    env = {**os.environ, "FASTSD_CPU_ISA": instruction_set, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True
    )


def runs_here(instruction_set: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_bf16": {"avx512_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    }
    return needed.get(instruction_set, set()) <= set(flags)
