"""Which implementation runs: a name, or "auto" for the fastest that can run on device and dtype.

An implementation is a module with the functions of `contract.py`, imported when first asked for. A
module that this installation does not have counts as one that cannot run. An explicit name runs
that implementation or raises; only "auto" looks further, and says why it did.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

_NAMES = ("reference", "chunked", "native", "triton")
_FASTEST = {"cuda": "triton", "cpu": "native"}
_ANYWHERE = "chunked"


def implementation_name(
    impl: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str:
    """What `impl` runs on `device` for hidden states of `dtype`; arguments and errors as below."""
    return implementation_choice(impl, device, dtype)[0]


def implementation_choice(
    impl: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """What runs, and why, for the header of a run.

    Args:
        impl: "auto", or an implementation's name: "reference", "chunked", "native" or "triton".
        device: where the hidden states are.
        dtype: theirs, after autocast.

    Returns: the implementation's name and one line, such as ("chunked", "native is not available:
        no compiler was found when fastsd was installed").

    Raises: ValueError for an unknown name; RuntimeError, with the reason and what to do, for a
        named implementation that cannot run.
    """
    device = torch.device(device)
    if impl == "auto":
        fastest = _FASTEST.get(device.type)
        if fastest is None:
            return _ANYWHERE, f"there is no other for {device.type}"
        reason = _why_not(fastest, device, dtype)
        if reason is None:
            return fastest, f"the fastest on {device.type}"
        return _ANYWHERE, f"{fastest} is not available: {reason}"
    if impl not in _NAMES:
        raise ValueError(f"impl: expected one of {', '.join(['auto', *_NAMES])}, got {impl!r}")
    reason = _why_not(impl, device, dtype)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} is not available: {reason}")
    return impl, "asked for"


def implementation(impl: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that runs; raises as `implementation_choice`."""
    name = implementation_name(impl, device, dtype)
    module = _module(name)
    assert module is not None
    return module


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    module = _module(name)
    if module is None:
        return f"this installation has none; use impl={_ANYWHERE!r} (any device) or impl='auto'"
    return module.why_not(device, dtype)


@cache
def _module(name: str) -> ModuleType | None:
    full_name = f"{__package__}.{name}"
    try:
        return import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        return None


# What torch.compiler.assume_constant_result sets, without importing the compiler: the choice is
# made when a graph is traced, and the arguments are constants there.
implementation_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
