"""Dtypes and implementations of decode attention that tests go over."""

from __future__ import annotations

import pytest
import torch

from fastsd_kernels.native_library import instruction_set

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
needs_library = pytest.mark.skipif(not instruction_set(), reason="library not built")
IMPLS = [pytest.param("native", marks=needs_library), "torch"]
