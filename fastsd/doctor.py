"""`python -m fastsd.doctor [--json]`: what this machine will use, and why.

Every line is asked of the code that a run would ask: the device and compute type of
`fastsd.runtime.hardware`, what linear layers and attention run through, and the loss head itself
with each implementation on a tiny problem. The matrix rate is that of torch.mm, measured, because a
processor that has bfloat16 instructions is not always faster with them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from importlib import metadata

import torch

import fastsd_kernels
from fastsd.model.cpu_linear import takes_onednn
from fastsd.runtime import hardware
from fastsd.runtime.program import run_main
from fastsd_kernels.prefix_attention import implementation_name

LOSS_HEAD_CHOICES = ("reference", "chunked", "native", "triton")
# Extra of pyproject.toml -> the modules it brings.
EXTRAS = {
    "gpu": ("triton", "flash_attn", "liger_kernel"),
    "lora": ("peft",),
    "gguf": ("gguf", "accelerate"),
    "critic": ("openai",),
    "vllm": ("httpx",),
    "trackers": ("tensorboard", "trackio", "wandb"),
    "data": ("reasoning_gym",),
}
# With these, glibc keeps large buffers instead of returning them and faulting them in every step.
ALLOCATOR_ADVICE = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}


def examine(gemm_seconds: float = 0.4) -> dict:
    """Everything the doctor knows, JSON-ready. Takes about `gemm_seconds` per compute type."""
    report = hardware.describe()
    device = report["device"]
    return report | {
        "transformers": metadata.version("transformers"),
        "gemm_tflops": {
            name: gemm_tflops(dtype, device, gemm_seconds)
            for name, dtype in hardware.DTYPES.items()
        },
        "linear": {name: linear_name(dtype, device) for name, dtype in hardware.DTYPES.items()},
        "attention": {
            name: implementation_name("auto", torch.device(device), dtype, head_dim=64)
            for name, dtype in hardware.DTYPES.items()
        },
        "loss_head": loss_heads(device),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR_ADVICE},
        "extras": {name: missing_modules(modules) for name, modules in EXTRAS.items()},
    }


def linear_name(dtype: torch.dtype, device: str) -> str:
    """What a model's linear layers run through when training."""
    return "onednn" if takes_onednn(torch.empty(1, dtype=dtype, device=device)) else "torch"


def gemm_tflops(dtype: torch.dtype, device: str, seconds: float, size: int = 1024) -> float:
    """Measured rate of a size x size x size matrix product, 2 size^3 operations, in 1e12 per s."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _timed_product(left, right)
    rounds, total = 0, 0.0
    while total < seconds:
        total += _timed_product(left, right)
        rounds += 1
    return 2 * size**3 * rounds / total / 1e12


def _timed_product(left: torch.Tensor, right: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - start


def loss_heads(device: str) -> dict:
    """Each implementation tried on a tiny problem: None where it works, else its own objection.

    "auto" is the name of the implementation that auto picks.
    """
    hidden_TD = torch.randn(2, 8, device=device)
    head_VD = torch.randn(16, 8, device=device)
    target_T = torch.zeros(2, dtype=torch.int64, device=device)

    def statistics(impl: str):
        return fastsd_kernels.fused_linear_statistics(hidden_TD, head_VD, target_T, impl=impl)

    found: dict[str, str | None] = {"auto": statistics("auto").impl}
    for name in LOSS_HEAD_CHOICES:
        try:
            statistics(name)
            found[name] = None
        except (NotImplementedError, ValueError, RuntimeError, ImportError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def missing_modules(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def render(report: dict) -> str:
    """The report as lines for people."""
    gib = 2**30
    total, available = report["memory_bytes"], report["memory_available_bytes"]
    memory = f"{total / gib:.1f} GiB, {available / gib:.1f} available" if total else "unknown"
    rates = {name: f"{rate:.3f}" for name, rate in report["gemm_tflops"].items()}
    ratio = report["gemm_tflops"]["bfloat16"] / report["gemm_tflops"]["float32"]
    lines = [
        ("python", f"{report['python']} on {report['system']}"),
        ("torch", f"{report['torch']}, transformers {report['transformers']}"),
        ("processor", f"{report['cpu']}: {' '.join(report['cpu_flags']) or 'no flags known'}"),
        ("cores", f"{report['cores']} usable, torch uses {report['threads']} thread(s)"),
        ("memory", memory),
        *_cuda_lines(report["cuda_devices"]),
        ("device", f"auto -> {report['device']}"),
        ("model.dtype", f"auto -> {report['dtype']}: {report['dtype_reason']}"),
        ("matrix rate", ", ".join(f"{name} {rate} TFLOP/s" for name, rate in rates.items())),
        ("", f"bfloat16 is {ratio:.1f}x float32 here (measured, 1024 x 1024 x 1024)"),
        *((label, _by_dtype(report[label])) for label in ("linear", "attention")),
        ("loss head", f"auto -> {report['loss_head']['auto']}"),
        *(("", f"{name}: {why}") for name, why in _choices(report["loss_head"])),
        *_allocator_lines(report["allocator"]),
        *(("extras", _extra_line(*entry)) for entry in report["extras"].items()),
    ]
    return "\n".join(f"{label:12} {text}" for label, text in lines)


def _cuda_lines(devices: list[dict]) -> list[tuple[str, str]]:
    if not devices:
        return [("CUDA", "no device")]
    return [
        ("CUDA", f"cuda:{i} {d['name']}, {d['memory_bytes'] / 2**30:.0f} GiB, sm {d['capability']}")
        for i, d in enumerate(devices)
    ]


def _by_dtype(names: dict[str, str]) -> str:
    return ", ".join(f"{dtype}: {name}" for dtype, name in names.items())


def _choices(loss_head: dict) -> list[tuple[str, str]]:
    return [(name, loss_head[name] or "available") for name in LOSS_HEAD_CHOICES]


def _allocator_lines(allocator: dict) -> list[tuple[str, str]]:
    if sys.platform != "linux":
        return []
    present = [f"{name}={value}" for name, value in allocator.items() if value is not None]
    lines = [("allocator", " ".join(present) or "glibc defaults")]
    absent = [f"{name}={ALLOCATOR_ADVICE[name]}" for name in allocator if allocator[name] is None]
    if absent:
        lines.append(("", "models above ~100 M parameters on a CPU run faster with:"))
        lines.append(("", " ".join(absent)))
    return lines


def _extra_line(name: str, missing: list[str]) -> str:
    if not missing:
        return f"{name}: installed"
    return f"{name}: without {', '.join(missing)}; pip install 'fastsd[{name}]'"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsd.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args(argv)

    def report() -> None:
        found = examine()
        print(json.dumps(found) if arguments.json else render(found))

    return run_main(report)


if __name__ == "__main__":
    sys.exit(main())
