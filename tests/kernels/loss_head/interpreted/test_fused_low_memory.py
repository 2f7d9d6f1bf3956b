"""Plan B's training in vocabulary slices, where plan A's fp32 sum of d head would not fit."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import require_interpreter

require_interpreter()

from fused_cases import check, many_small_blocks  # noqa: E402, F401

from fastsd_kernels import fused_linear_loss  # noqa: E402
from fastsd_kernels.loss_head.triton import fused  # noqa: E402
from fastsd_kernels.testing import (  # noqa: E402
    BF16_GRADIENT_ERROR,
    FP32_ERROR,
    loss_head_inputs,
)


@pytest.mark.parametrize(
    "divergence, dtype",
    [
        ("forward_kl", torch.float32),
        ("reverse_kl", torch.float32),
        ("sampled_token", torch.float32),  # in bf16 single rows dominate, in plan A too
        ("forward_kl", torch.bfloat16),
        ("reverse_kl", torch.bfloat16),
    ],
    ids=str,
)
def test_vocabulary_slices_where_memory_is_short(divergence, dtype, monkeypatch):
    """Slices of 48 columns, the last one ragged; every term, softcap and a teacher's own head."""
    ran, plain = [], fused._run_in_slices
    monkeypatch.setattr(fused, "_short_of_memory", lambda _: True)
    monkeypatch.setattr(fused, "SLICE_COLUMNS", 48)
    monkeypatch.setattr(fused, "_run_in_slices", lambda *a: ran.append(1) or plain(*a))
    x = loss_head_inputs(32, 16, 120, dtype, seed=1)
    x["teacher_head_VD"] = loss_head_inputs(1, 16, 120, dtype, seed=2)["head_VD"].detach()
    del x["old_logprob_T"]
    budget = FP32_ERROR if dtype == torch.float32 else BF16_GRADIENT_ERROR
    check(x, FP32_ERROR, budget, divergence=divergence, softcap=3.0, temperature=0.7)
    assert ran


def test_a_frozen_head_needs_no_slices(monkeypatch):
    """Plan A sums nothing over chunks then, and costs half the products."""
    monkeypatch.setattr(fused, "_short_of_memory", lambda _: True)
    monkeypatch.setattr(fused, "_run_in_slices", lambda *_: pytest.fail("slices"))
    x = loss_head_inputs(3, 8, 70, torch.float32)
    x["head_VD"] = x["head_VD"].detach()
    fused_linear_loss(**x, impl="triton").loss.backward()
    assert x["student_TD"].grad is not None
