"""The device and compute type follow from what the machine has."""

from __future__ import annotations

import json

import pytest
import torch

from fastsd import doctor
from fastsd.runtime import hardware
from fastsd.runtime.hardware import HardwareError, resolve_device, resolve_dtype


def set_cuda(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_prefers_cuda(monkeypatch):
    set_cuda(monkeypatch, 2)
    assert resolve_device("auto") == "cuda"
    assert [resolve_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    set_cuda(monkeypatch, 0)
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda", 0, "no CUDA device"),
        ("cuda:2", 2, r"2 CUDA device\(s\)"),
        ("gpu", 2, "allowed are"),
        ("cuda:x", 2, "allowed are"),
    ],
)
def test_devices_that_are_not_here_are_refused(monkeypatch, name, count, message):
    set_cuda(monkeypatch, count)
    with pytest.raises(HardwareError, match=message) as caught:
        resolve_device(name)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx2", "avx512f"}, torch.float32),
        ({"avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu_follows_its_instructions(monkeypatch, flags, dtype):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
    assert resolve_dtype("auto", "cpu") == dtype
    assert resolve_dtype("float32", "cpu") == torch.float32
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    assert hardware.dtype_reason("cpu").startswith("the processor has")
    with pytest.raises(HardwareError, match="float16"):
        resolve_dtype("float16", "cpu")


@pytest.mark.parametrize("supported", [True, False])
def test_auto_dtype_on_a_gpu_asks_torch_without_emulation(monkeypatch, supported):
    def is_bf16_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert resolve_dtype("auto", "cuda") == (torch.bfloat16 if supported else torch.float32)


def test_doctor_reports_what_a_run_would_choose(monkeypatch, capsys):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    monkeypatch.setattr(doctor, "EXTRAS", {"lora": ("no_such_module",), "test": ("pytest",)})
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    device = resolve_device("auto")
    assert report["device"] == device
    assert f"torch.{report['dtype']}" == str(resolve_dtype("auto", device))
    assert report["gemm_tflops"].keys() == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in report["gemm_tflops"].values())
    for name, choices in (("linear", {"onednn", "torch"}), ("attention", {"native", "torch"})):
        assert report[name].keys() == {"float32", "bfloat16"}
        assert set(report[name].values()) <= choices | {"flash_attn", "reference"}
    assert report["loss_head"]["reference"] is None
    assert report["loss_head"][report["loss_head"]["auto"]] is None
    text = doctor.render(report)
    assert "lora: without no_such_module; pip install 'fastsd[lora]'" in text
    assert "test: installed" in text
    assert "MALLOC_ARENA_MAX=1" in text and "MALLOC_TOP_PAD_=268435456" in text


def test_a_loss_head_that_objects_is_reported_with_its_words(monkeypatch):
    import fastsd_kernels

    real = fastsd_kernels.fused_linear_statistics

    def statistics(*tensors, impl):
        if impl == "native":
            raise NotImplementedError("no library: run make native")
        return real(*tensors, impl="reference" if impl == "triton" else impl)

    monkeypatch.setattr(fastsd_kernels, "fused_linear_statistics", statistics, raising=False)
    found = doctor.loss_heads("cpu")
    assert found["native"] == "NotImplementedError: no library: run make native"
    assert found["triton"] is None
