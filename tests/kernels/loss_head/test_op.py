"""The operators: opcheck, fakes, the definition behind them, rows blanked under capture."""

from __future__ import annotations

import pytest
import torch
from loss_head_cases import (
    FP64_ERROR,
    HERE,
    LEAVES,
    OPTION_IDS,
    OPTION_SETS,
    case,
    close,
    loss_arguments,
    step,
)
from torch.library import opcheck

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head import op, reference
from fastsd_kernels.loss_head.contract import Inputs, Options
from fastsd_kernels.testing import FP32_ERROR, relative_error


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("options", OPTION_SETS, ids=OPTION_IDS)
def test_opcheck_of_the_loss(options, impl):
    x, settings = case(options)
    has_bias = "bias_V" in x
    opcheck(op.linear_loss, loss_arguments(x, settings, impl, [True, True, has_bias]))
    x = {name: value.detach() for name, value in x.items()}
    opcheck(op.linear_loss, loss_arguments(x, settings, impl, [False, False, False]))


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_with_strides_and_a_frozen_head(dtype, frozen, impl):
    x, settings = case({"divergence": "jsd"}, dtype=dtype)
    for name in ("student_TD", "head_VD", "teacher_TD"):
        trained = name == "student_TD" or (name == "head_VD" and not frozen)
        x[name] = x[name].detach().T.contiguous().T.requires_grad_(trained)
    x["bias_V"] = x["bias_V"].detach()
    opcheck(op.linear_loss, loss_arguments(x, settings, impl, [True, not frozen, False]))


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("options", OPTION_SETS, ids=OPTION_IDS)
def test_opcheck_of_the_statistics(options, impl):
    x, settings = case({k: v for k, v in options.items() if k != "clip"})
    tensors = list(vars(Inputs(**x)).values())[:6]
    flags = list(vars(Options(**settings)).values())[:-1]
    for mask_T in (None, torch.arange(7) % 3 != 0):
        opcheck(op.linear_statistics, (*tensors, mask_T, *flags, impl))


def test_the_operator_refuses_gradients_of_nothing():
    x, settings = case({"without": ("bias_V",)})
    for wanted in ([True, True, True], [True, True]):
        with pytest.raises(ValueError, match="wanted: expected three bools"):
            op.linear_loss(*loss_arguments(x, settings, "chunked", wanted))


@pytest.mark.parametrize("options", OPTION_SETS, ids=OPTION_IDS)
def test_meta_tensors_have_the_shapes_of_real_ones(options):
    x, settings = case(options)
    real = fused_linear_loss(**x, **settings)
    found = fused_linear_loss(**{name: value.to("meta") for name, value in x.items()}, **settings)
    for name in ("loss", *op.STATISTICS):
        a, b = getattr(found, name), getattr(real, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.shape, a.dtype) == (b.shape, b.dtype), name


@pytest.mark.parametrize("options", OPTION_SETS, ids=OPTION_IDS)
def test_the_operator_is_the_definition(options):
    x, settings = case(options, dtype=torch.float64)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    if "teacher_TD" in x and "divergence_weight_T" not in x:
        inputs["divergence_weight_T"] = torch.ones(7, dtype=torch.float64)
    loss, _ = reference.loss(Inputs(**inputs), Options(**settings))
    names = [name for name in LEAVES if name in x]
    exact = torch.autograd.grad(loss, [x[name] for name in names])
    expected = {"loss": loss.detach()} | dict(zip(names, exact, strict=True))
    for impl in ("reference", "chunked"):
        close(step(x, impl=impl, **settings), expected, FP64_ERROR)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("options", OPTION_SETS, ids=OPTION_IDS)
def test_capture_blanks_rows_instead_of_dropping_them(options, impl, monkeypatch):
    x, settings = case(options)
    if "divergence_weight_T" in x or "teacher_TD" not in x:  # else every row counts
        x["student_TD"].detach()[::3] = torch.nan
        x["target_T"][::3] = -100
    dropped = step(x, impl=impl, **settings)
    before = fused_linear_loss(**x, impl=impl, **settings)
    monkeypatch.setattr(op, "capturing", lambda device: True)
    close(step(x, impl=impl, **settings), dropped, FP32_ERROR)
    after = fused_linear_loss(**x, impl=impl, **settings)
    for name in op.STATISTICS:
        if getattr(before, name) is not None:
            found, expected = getattr(after, name), getattr(before, name)
            assert relative_error(found, expected) <= FP32_ERROR, name
            assert torch.equal(found == 0, expected == 0), name
