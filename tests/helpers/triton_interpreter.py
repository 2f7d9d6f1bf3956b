"""Triton's interpreter as a test bench: bf16 rounded as hardware does, every access recorded.

Only for processes with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def require_interpreter() -> None:
    """Skips the calling test module in a process that compiles kernels."""
    if not INTERPRETED:
        pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)


@contextmanager
def rounded_bf16() -> Iterator[None]:
    """fp32 to bf16 to the nearest, as GPUs do; Triton 3.9's interpreter cuts the low bits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        found = torch.from_numpy(np.ascontiguousarray(values).view(np.float32)).bfloat16()
        return found.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = rounded
    try:
        yield
    finally:
        interpreter._convert_float = convert


@contextmanager
def patched_once() -> Iterator[None]:
    """The interpreter patches triton.language again for every call of a helper: once will do."""
    from triton.runtime import interpreter

    patch, active = interpreter._patch_lang, set()

    class Nothing:
        def restore(self) -> None:
            pass

    def patch_first(function):
        modules = frozenset(id(x) for x in function.__globals__.values() if inspect.ismodule(x))
        if modules in active:
            return Nothing()
        active.add(modules)
        scope = patch(function)
        restore = scope.restore

        def restored() -> None:
            active.clear()
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = patch_first
    try:
        yield
    finally:
        interpreter._patch_lang = patch


class MemoryTracer:
    """Within `recording()`: bytes loaded and stored, and accesses outside what is `allow`ed.

    A row-strided matrix allows its elements and not the gaps between its rows.
    """

    def __init__(self) -> None:
        self._first, self._last = [], []
        self.loaded = self.stored = 0
        self.outside: list[str] = []

    def allow(self, *tensors: Tensor | None) -> None:
        for x in tensors:
            if x is None or x.numel() == 0:
                continue
            rows = x if x.ndim == 2 else x[None]
            assert rows.stride(1) == 1
            for row in rows:
                self._first.append(row.data_ptr())
                self._last.append(row.data_ptr() + row.numel() * row.element_size())

    @contextmanager
    def recording(self) -> Iterator[None]:
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        load, store = Builder.create_masked_load, Builder.create_masked_store

        def traced_load(builder, ptrs, mask, *rest):
            self.loaded += self._check("load", ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def traced_store(builder, ptrs, value, mask, *rest):
            self.stored += self._check("store", ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        Builder.create_masked_load, Builder.create_masked_store = traced_load, traced_store
        self._starts = np.sort(np.array(self._first, dtype=np.uint64))
        self._ends = np.sort(np.array(self._last, dtype=np.uint64))
        try:
            yield
        finally:
            Builder.create_masked_load, Builder.create_masked_store = load, store

    def _check(self, what: str, ptrs, mask) -> int:
        """Bytes of the access; a note if any of it lies outside."""
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        at = np.atleast_1d(ptrs.data)[np.atleast_1d(mask.data)].astype(np.uint64)
        if at.size == 0 or self._starts.size == 0:
            return at.size * size
        index = np.searchsorted(self._starts, at, side="right").astype(np.int64) - 1
        wrong = (index < 0) | (at + np.uint64(size) > self._ends[np.maximum(index, 0)])
        if wrong.any():
            self.outside.append(f"{what} of {int(wrong.sum())} elements outside")
        return at.size * size
