"""impl="triton" under the interpreter, beside the fp64 reference. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import patched_once, rounded_bf16

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head.triton import scratch
from fastsd_kernels.testing import relative_error

STATISTICS = ("divergence_T", "student_logprob_T", "teacher_logprob_T", "entropy_T")
CLIPPED = ("policy_clipped_T", "entry_clipped_T")
LEAVES = ("student_TD", "head_VD", "bias_V")
BLOCK = 128


@pytest.fixture(autouse=True)
def many_small_blocks(monkeypatch):
    """Several blocks in a small vocabulary, bf16 as hardware rounds it."""
    monkeypatch.setattr(
        scratch, "row_config", lambda capability, kernel: {"BLOCK": BLOCK, "num_warps": 4}
    )
    with rounded_bf16(), patched_once():
        yield


def run(x: dict, impl: str = "triton", upstream: float = 1.0, **options) -> dict:
    """Loss, statistics and gradients of one call, all detached."""
    leaves = {k: x[k].detach().clone().requires_grad_() for k in LEAVES if x.get(k) is not None}
    out = fused_linear_loss(**{**x, **leaves}, **options, impl=impl)
    (out.loss * upstream).backward()
    assert out.impl == impl
    found = {"loss": out.loss} | {name: getattr(out, name) for name in (*STATISTICS, *CLIPPED)}
    found |= {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach() for name, value in found.items() if value is not None}


def widened(x: dict) -> dict:
    return {k: v.detach().double() if v.is_floating_point() else v for k, v in x.items()}


def loss_scale(x: dict, exact: dict) -> float:
    """Sum of the sizes of the loss's terms, which may cancel."""
    total = float(abs(exact["loss"]))
    for weight, value in zip(
        ("divergence_weight_T", "policy_weight_T", "entropy_weight_T"),
        ("divergence_T", "student_logprob_T", "entropy_T"),
        strict=True,
    ):
        if x.get(weight) is not None:
            total += float((x[weight] * exact[value]).abs().sum())
    return total


def check(x: dict, budget: float, gradient_budget: float, **options) -> None:
    found, exact = run(x, **options), run(widened(x), "reference", **options)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if name in CLIPPED:
            assert torch.equal(found[name], value), name
        elif name == "loss":
            assert abs(found[name] - value) <= budget * loss_scale(x, exact), name
        else:
            limit = gradient_budget if name.startswith("d ") else budget
            assert relative_error(found[name], value) <= limit, name
