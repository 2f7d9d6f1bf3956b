"""The C++ kernel for CPUs (csrc/tree.h): a whole tree's attention in one call, either direction.

A row's softmax over all segments it sees happens in one place, so nothing is merged, and trees of
many small segments cost no call each.

Shapes: T tokens of the pack, P of the prefixes from outside, N query heads, K key/value heads,
H head dim.
"""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from .. import native_library
from .merged import Tensors
from .tree import PrefixTree

DTYPES = {torch.float32: native_library.F32, torch.bfloat16: native_library.BF16}
_INPUTS = ("query", "key", "value", "prefix_key", "prefix_value")


class Problem(Structure):
    """FastsdTree."""

    _fields_ = [
        *((name, c_void_p) for name in _INPUTS),
        *((f"{name}_{of}", c_int64) for name in _INPUTS for of in ("stride", "head_stride")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "segments", "outside")),
        *((name, c_void_p) for name in ("lengths", "parents")),
        *((name, c_int32) for name in ("dtype", "threads")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("out", "lse", "grad")),
        *((name, c_int64) for name in ("grad_stride", "grad_head_stride")),
        *((f"d_{name}", c_void_p) for name in _INPUTS),
    ]


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where it can run, else the reason and what to do."""
    if device.type != "cpu":
        return f"the C++ kernel runs on CPUs, these tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"the C++ kernel takes fp32 or bf16, not {dtype}; cast the tensors"
    return native_library.missing("use impl='torch'")


def forward(tensors: Tensors, tree: PrefixTree, scale: float) -> tuple[Tensor, Tensor]:
    """out_TNH in the query's dtype, lse_TN fp32."""
    out_TNH = torch.empty(tensors.query_TNH.shape, dtype=tensors.query_TNH.dtype)
    lse_TN = torch.empty(out_TNH.shape[:2], dtype=torch.float32)
    problem = _problem(tensors, tree, scale, out_TNH, lse_TN)
    native_library.call("tree_forward", problem)
    return out_TNH, lse_TN


def backward(
    grad_TNH: Tensor,
    tensors: Tensors,
    out_TNH: Tensor,
    lse_TN: Tensor,
    tree: PrefixTree,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of the five tensors, in their dtypes."""
    problem = _problem(tensors, tree, scale, out_TNH.contiguous(), lse_TN.contiguous())
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in tensors)
    for name, gradient in zip(_INPUTS, gradients, strict=True):
        setattr(problem, f"d_{name}", gradient.data_ptr())
    problem.grad = grad_TNH.data_ptr()
    problem.grad_stride, problem.grad_head_stride = grad_TNH.stride()[:2]
    native_library.call("tree_backward", problem)
    return gradients


def _problem(
    tensors: Tensors, tree: PrefixTree, scale: float, out_TNH: Tensor, lse_TN: Tensor
) -> Problem:
    _, heads, head_dim = tensors.query_TNH.shape
    problem = Problem(
        heads=heads,
        kv_heads=tensors.key_TKH.shape[1],
        head_dim=head_dim,
        segments=len(tree.lengths),
        outside=tree.outside,
        lengths=tree.segments[0].data_ptr(),
        parents=tree.segments[1].data_ptr(),
        dtype=DTYPES[tensors.query_TNH.dtype],
        threads=torch.get_num_threads(),
        scale=scale,
        out=out_TNH.data_ptr(),
        lse=lse_TN.data_ptr(),
    )
    for name, tensor in zip(_INPUTS, tensors, strict=True):
        setattr(problem, name, tensor.data_ptr())
        setattr(problem, f"{name}_stride", tensor.stride(0))
        setattr(problem, f"{name}_head_stride", tensor.stride(1))
    problem.tensors = (tensors, tree, out_TNH, lse_TN)  # alive as long as their pointers
    return problem
