"""Importing the kernel package is cheap, and its source root is no package."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import ROOT

import fastsd_kernels

PROBE = """
import sys, time
import torch
start = time.perf_counter()
import fastsd_kernels
from fastsd_kernels import fused_linear_loss
seconds = time.perf_counter() - start
loaded = [m for m in ("triton", "transformers") if m in sys.modules]
print(seconds, loaded)
"""


def test_kernels_is_a_source_root_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_light():
    run = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT / "kernels")}, cwd=ROOT,
    )  # fmt: skip
    seconds, loaded = run.stdout.split(maxsplit=1)
    assert loaded.strip() == "[]"
    # 0.1 s on an idle machine; the margin is for a loaded one.
    assert float(seconds) < 0.5


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(fastsd_kernels, "no_such_name")  # noqa: B009
