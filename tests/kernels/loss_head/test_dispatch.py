"""The choice of implementation: auto by device, explicit names never replaced, reasons kept."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.loss_head import dispatch, implementation_choice, implementation_name
from fastsd_kernels.testing import loss_head_inputs


@pytest.fixture
def reasons(monkeypatch):
    """Replaces the objections of native and triton: {name: why_not's answer}."""
    answers = {"native": None, "triton": None}

    def module(name: str):
        if name in answers:
            return SimpleNamespace(why_not=lambda device, dtype: answers[name])
        return SimpleNamespace(why_not=lambda device, dtype: None)

    monkeypatch.setattr(dispatch, "_module", module)
    return answers


@pytest.fixture
def no_module(monkeypatch, tmp_path):
    """impl="native" is a module that this installation does not have."""
    for name in ("reference", "chunked"):
        dispatch._module(name)  # found among the loaded modules from here on
    loss_head = sys.modules[dispatch.__package__]
    monkeypatch.setattr(loss_head, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"{dispatch.__package__}.native", raising=False)
    dispatch._module.cache_clear()
    yield
    dispatch._module.cache_clear()


@pytest.mark.parametrize("device, name", [("cpu", "native"), ("cuda", "triton"),
                                          ("cuda:1", "triton"), ("meta", "chunked")])  # fmt: skip
def test_auto_takes_the_fastest_of_the_device(reasons, device, name):
    assert implementation_name("auto", device, torch.bfloat16) == name
    assert implementation_choice("auto", torch.device(device))[0] == name


@pytest.mark.parametrize("device, fastest", [("cpu", "native"), ("cuda", "triton")])
def test_auto_falls_back_and_says_why(reasons, device, fastest):
    reasons[fastest] = "no library: pip install again with g++ at hand"
    name, why = implementation_choice("auto", device)
    assert name == "chunked"
    assert why == f"{fastest} is not available: no library: pip install again with g++ at hand"


def test_an_explicit_name_never_falls_back(reasons):
    reasons["native"] = "float64 is not built; use impl='chunked'"
    with pytest.raises(RuntimeError, match="impl='native' is not available: float64 is not built"):
        implementation_name("native", "cpu", torch.float64)
    for name in ("reference", "chunked", "triton"):
        assert implementation_choice(name) == (name, "asked for")
    with pytest.raises(ValueError, match="impl: expected one of auto, reference.*got 'fast'"):
        implementation_name("fast")


def test_device_and_dtype_reach_the_implementation(monkeypatch):
    asked = []
    module = SimpleNamespace(why_not=lambda device, dtype: asked.append((device, dtype)))
    monkeypatch.setattr(dispatch, "_module", lambda name: module)
    implementation_name("auto", "cuda:2", torch.bfloat16)
    assert asked == [(torch.device("cuda:2"), torch.bfloat16)]


def test_a_module_that_is_not_there(no_module):
    assert implementation_choice("auto")[0] == "chunked"
    assert "this installation has none" in implementation_choice("auto")[1]
    x = loss_head_inputs(3, 4, 5, torch.float32)
    assert fused_linear_loss(**x).impl == "chunked"
    for call in (fused_linear_loss, fused_linear_statistics):
        with pytest.raises(RuntimeError, match="impl='native' is not available.*impl='chunked'"):
            call(x["student_TD"], x["head_VD"], x["target_T"], impl="native",
                 **({"teacher_TD": x["teacher_TD"]}))  # fmt: skip


def test_a_module_that_cannot_be_imported_is_an_error(tmp_path, no_module):
    (tmp_path / "native.py").write_text("import a_dependency_that_is_missing")
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_missing"):
        implementation_name("auto")


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_the_output_names_what_the_choice_named(impl):
    x = loss_head_inputs(3, 4, 5, torch.float32)
    assert fused_linear_loss(**x, impl=impl).impl == implementation_name(impl)
    tensors = (x["student_TD"], x["head_VD"], x["target_T"])
    assert fused_linear_statistics(*tensors, impl=impl).impl == implementation_name(impl)
