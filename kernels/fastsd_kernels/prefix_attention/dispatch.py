"""Which implementation runs: a name, or "auto" for the first that can run.

An explicit name runs that implementation or raises; only "auto" looks further.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from . import native

NAMES = ("auto", "reference", "native", "torch", "flash_attn")


def implementation_name(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Raises ValueError for an unknown name, RuntimeError with why a known one cannot run."""
    if impl not in NAMES:
        raise ValueError(f"impl: expected one of {', '.join(NAMES)}, got {impl!r}")
    if impl == "reference":
        return impl
    if impl == "auto":
        fastest = ("native", "flash_attn", "torch")
        usable = (n for n in fastest if _why_not(n, device, dtype, head_dim) is None)
        return next(usable, "reference")
    reason = _why_not(impl, device, dtype, head_dim)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {reason}")
    return impl


def kernel(impl: str, device: torch.device) -> ModuleType:
    """The module of the named implementation for the device."""
    if impl not in ("native", "torch", "flash_attn"):
        raise ValueError(f"impl: expected 'native', 'torch' or 'flash_attn', got {impl!r}")
    if impl == "native":
        return native
    at_home = "cpu_flash" if device.type == "cpu" else "cuda_flash"
    name = at_home if impl == "torch" else "flash_attn_package"
    return import_module(f"{__package__}.{name}")


def _why_not(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return kernel(impl, device).why_not(device, dtype, head_dim)


# What torch.compiler.assume_constant_result sets, without importing the compiler: the choice is
# made when a graph is traced, and the arguments are constants there.
implementation_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
