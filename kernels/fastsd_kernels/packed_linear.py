"""A linear layer for a few rows on a CPU: the weight is packed once, a call reads it once.

    y = x W^T + b

What torch.nn.functional.linear computes, for decoding, where every step multiplies 1 to a few
hundred rows with the same weights. Sums are in fp32 whatever the dtype, and the logits of a bf16
model can be had in fp32. A row's result has the same bits whatever rows are beside it and however
many threads there are (csrc/linear.h).

Shapes: N outputs, K inputs; M rows.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from . import native_library as lib

_INSTEAD = "use torch.nn.functional.linear"


class PackedLinear:
    """Inference only. Packs on construction; `repack` after the weight or the bias has changed."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None):
        """
        Args:
            weight_NK: fp32 or bf16 on the CPU, any strides; kept, for `repack`.
            bias_N: any floating point dtype, added in fp32; kept too.

        Raises: ValueError or TypeError naming the argument; RuntimeError with the reason where the
            C++ library cannot run.
        """
        reason = lib.missing(_INSTEAD)
        if reason is not None:
            raise RuntimeError(f"PackedLinear cannot run: {reason}")
        if weight_NK.ndim != 2 or 0 in weight_NK.shape:
            raise ValueError(f"weight_NK: expected [N, K], got {list(weight_NK.shape)}")
        if weight_NK.dtype not in lib.DTYPES or weight_NK.device.type != "cpu":
            raise TypeError(
                "weight_NK: expected float32 or bfloat16 on the CPU, got "
                f"{weight_NK.dtype} on {weight_NK.device}; {_INSTEAD}"
            )
        if bias_N is not None and bias_N.shape != weight_NK.shape[:1]:
            raise ValueError(f"bias_N: expected [{weight_NK.shape[0]}], got {list(bias_N.shape)}")
        self.weight_NK, self.bias_N = weight_NK, bias_N
        self._shape, self._dtype = weight_NK.shape, weight_NK.dtype
        n, k = self._shape
        self._packed = lib.aligned(lib.packed_bytes(weight_NK.dtype, n, k))
        # In place: the addresses below stay.
        self._bias_N = None if bias_N is None else torch.empty(n, dtype=torch.float32)
        self._problem = lib.Linear(
            packed=self._packed.data_ptr(),
            bias=None if self._bias_N is None else self._bias_N.data_ptr(),
            n=n, k=k, y_stride=n, dtype=lib.DTYPES[weight_NK.dtype],
        )  # fmt: skip
        self._linear = lib.function("linear")
        self.repack()

    def repack(self) -> None:
        """Reads weight and bias again, into the memory that is already there."""
        weight_NK = self.weight_NK.detach()
        if weight_NK.stride(1) != 1:
            weight_NK = weight_NK.contiguous()
        lib.call(
            "pack", lib.DTYPES[self._dtype], weight_NK, weight_NK.stride(0), *self._shape,
            self._packed, torch.get_num_threads(),
        )  # fmt: skip
        if self._bias_N is not None and self.bias_N is not None:
            self._bias_N.copy_(self.bias_N.detach())
        self._packed_changes = self._changes()

    def _changes(self) -> int:
        """How often autograd has seen them change in place."""
        return _version(self.weight_NK) + (0 if self.bias_N is None else _version(self.bias_N))

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x: [..., K] of the weight's dtype. Returns [..., N] in out_dtype, fp32 or bf16, default
        x's dtype.

        Raises: ValueError or TypeError naming the argument; RuntimeError where x needs a gradient
            or the weight was changed in place after it was packed; MemoryError.
        """
        n, k = self._shape
        if x.dtype != self._dtype or not x.is_cpu:
            raise TypeError(f"x: expected {self._dtype} on the CPU, got {x.dtype} on {x.device}")
        shape = x.shape
        if not shape or shape[-1] != k:
            raise ValueError(f"x: expected [..., {k}], got {list(shape)}")
        if self._changes() != self._packed_changes:
            raise RuntimeError("weight_NK or bias_N has changed since it was packed; call repack")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"x: PackedLinear has no gradient; use torch.no_grad or {_INSTEAD}")
        # A copy: threads of Python may call at the same time.
        problem = lib.Linear.from_buffer_copy(self._problem)
        if len(shape) == 2 and x.stride(1) == 1:
            problem.m, problem.x_stride = shape[0], x.stride(0)
        else:
            x = x.contiguous()
            problem.m, problem.x_stride = x.numel() // k, k
        y = torch.empty((*shape[:-1], n), dtype=out_dtype or self._dtype)
        if y.dtype not in lib.DTYPES:
            raise TypeError(f"out_dtype: expected float32 or bfloat16, got {y.dtype}")
        problem.x, problem.y, problem.out_dtype = x.data_ptr(), y.data_ptr(), lib.DTYPES[y.dtype]
        problem.threads = torch.get_num_threads()
        lib.check(self._linear(byref(problem)), "linear")
        return y


def _version(x: Tensor) -> int:
    # Tensors made in inference mode count nothing.
    return 0 if x.is_inference() else x._version
