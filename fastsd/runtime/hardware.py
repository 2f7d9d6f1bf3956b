"""What this machine is, and the device and compute type that follow from it.

The trainer, the evaluation and `fastsd.doctor` ask the same functions, so what the doctor prints is
what a run will use. bfloat16 is chosen only where the processor multiplies it natively (AVX-512
BF16 or AMX): elsewhere torch emulates it and it is slower than float32. Master weights and
optimizer state are float32 whatever is chosen here.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from fastsd.errors import FastsdError

CPU_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
REPORTED_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HardwareError(FastsdError):
    """The configuration asks for a device or type that this machine does not have."""


def resolve_device(name: str, local_rank: int | None = None) -> str:
    """`Config.device` -> "cpu", "cuda" or "cuda:N"; auto is cuda where there is one.

    local_rank: this process's number on the machine where there are many, each with its own GPU.
    Raises HardwareError if the named device is not here.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if devices else "cpu"
    elif name.startswith("cuda:") and local_rank is not None:
        hint = "each of many processes takes its own GPU; set --device cuda"
        raise HardwareError(f'device = "{name}": {hint}')
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    if name == "cpu" or (name == "cuda" and devices):
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise HardwareError(f'device = "{name}": allowed are "auto", "cpu", "cuda" and "cuda:N"')
    if int(index or 0) >= devices:
        found = f"{devices} CUDA device(s)" if devices else "no CUDA device"
        raise HardwareError(f'device = "{name}": torch finds {found} here; set --device auto')
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """`Config.model.dtype` on a resolved device -> the compute type; raises HardwareError."""
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    if name not in DTYPES:
        allowed = '"auto", "float32" and "bfloat16"'
        raise HardwareError(f'model.dtype = "{name}": allowed are {allowed}')
    return DTYPES[name]


def dtype_reason(device: str) -> str:
    """One clause: why `resolve_dtype("auto", device)` chose what it chose."""
    if device.startswith("cuda"):
        return "the GPU has bfloat16" if _has_bfloat16(device) else "the GPU lacks bfloat16"
    found = sorted(CPU_BFLOAT16_FLAGS & cpu_flags())
    if found:
        return f"the processor has {', '.join(found)}"
    return "the processor has neither avx512_bf16 nor amx_bf16, so bfloat16 would be emulated"


def _has_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(CPU_BFLOAT16_FLAGS & cpu_flags())


def describe() -> dict:
    """The machine in JSON-ready values: versions, processor, memory, GPUs, and what auto means."""
    device = resolve_device("auto")
    total_bytes, available_bytes = memory_bytes()
    flags = cpu_flags()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_flags": [flag for flag in REPORTED_CPU_FLAGS if flag in flags],
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_bytes,
        "memory_available_bytes": available_bytes,
        "cuda_devices": _cuda_devices(),
        "device": device,
        "dtype": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "dtype_reason": dtype_reason(device),
    }


def usable_cores() -> int:
    """Cores this process may run on, which a container can make fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags() -> frozenset[str]:
    """The instruction-set flags the kernel reports; empty where there is no /proc/cpuinfo."""
    return frozenset(_cpuinfo("flags").split())


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == field:
            return value.strip()
    return ""


def memory_bytes() -> tuple[int | None, int | None]:
    """(total, available) memory; None where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None, None
    kib = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        kib[key] = int(value.split()[0])
    return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024


def _cuda_devices() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        entry = {"name": properties.name, "memory_bytes": properties.total_memory}
        devices.append(entry | {"capability": capability})
    return devices
