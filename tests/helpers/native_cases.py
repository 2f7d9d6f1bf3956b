"""What the tests of the C++ loss head share: its calls, and what a call may be off by."""

from __future__ import annotations

from itertools import product

import torch
from all_pairs import sweep
from loss_head_options import DIVERGENCES, OPTIONS

from fastsd_kernels.loss_head.contract import Options
from fastsd_kernels.testing import (
    BF16_GRADIENT_ERROR,
    FP32_ERROR,
    loss_head_inputs,
    relative_error,
)

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = (FP32, BF16)
GRADIENTS = ("d student_TD", "d head_VD", "d bias_V")
DROPPED = {
    "all": (),
    "lean": ("entropy_weight_T",),
    "divergence": ("entropy_weight_T", "policy_weight_T", "old_logprob_T"),
    "policy": ("entropy_weight_T", "teacher_TD", "divergence_weight_T"),
    "no teacher": ("teacher_TD", "divergence_weight_T", "old_logprob_T"),
}
CASES = [(terms, options) for options in OPTIONS for terms in ("all", "lean")]
CASES += [("divergence", {"divergence": d, "beta": 0.3}) for d in DIVERGENCES]
CASES += [("policy", {}), ("policy", {"clip": 0.2}), ("no teacher", {})]
CASES += [("no teacher", {"softcap": 2.0, "temperature": 0.7})]
CASE_IDS = [f"{terms} {options}" for terms, options in CASES]


def native_sweep(**others: list | tuple) -> list:
    """CASES times the values of other factors as parameters, all pairs of options in the fast
    tier."""
    cases = []
    for (terms, options), *values in product(CASES, *others.values()):
        factors = {
            "terms": terms,
            **vars(Options(**options)),
            **dict(zip(others, values, strict=True)),
        }
        name = "-".join(map(str, (f"{terms} {options}", *values)))
        cases.append(((terms, options, *values), name, factors))
    return sweep(cases)


def inputs(shape, dtype, terms="all", **more):
    x = loss_head_inputs(*shape, dtype, **more)
    return {name: value for name, value in x.items() if name not in DROPPED[terms]}


def without_clip(options: dict, x: dict) -> dict:
    """The clip needs old_logprob_T."""
    return options if "old_logprob_T" in x else {k: v for k, v in options.items() if k != "clip"}


def check(found, exact, budget: float, gradients: float, value: float | None = None):
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        if expected.dtype in (torch.bool, torch.int64):
            assert torch.equal(found[name], expected), name
            continue
        jsd = value is not None and name in ("loss", "divergence_T")
        limit = gradients if name in GRADIENTS else value if jsd else budget
        if (
            name == "divergence_T"
        ):  # a small one is a difference of fp32 log-masses, 2 u = 2^-23 each
            limit += 2**-23 * len(expected) ** 0.5 / max(1e-9, float(expected.norm()))
        assert relative_error(found[name], expected) <= limit, name


def budgets(x: dict, options: dict) -> dict:
    """Of `check`. The JSD of compact bf16 forms sums fp16 summands, see the test of its value."""
    if x["student_TD"].dtype == FP32:
        return {"budget": FP32_ERROR, "gradients": FP32_ERROR}
    compact = "entropy_weight_T" not in x and options.get("divergence") == "jsd"
    return {
        "budget": FP32_ERROR,
        "gradients": BF16_GRADIENT_ERROR,
        "value": 2**-11 if compact else None,
    }
