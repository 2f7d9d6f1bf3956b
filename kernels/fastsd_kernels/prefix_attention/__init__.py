"""Attention over a packed token tree: what several sequences share is computed and stored once.

The question, the feedback and the rollouts of a group are the segments of a `PrefixTree`; the
tokens of all of them lie packed in one tensor. `reference.py` is the definition. On CPUs one C++
call runs the whole tree (`native.py`). Elsewhere a flash kernel runs per part (`plan.py`), on the
tree's own keys, never repeated, and the results are merged exactly, backward included
(`merged.py`). Here: the public interface.

Shapes: T tokens of the pack, P of the prefixes from outside, N heads (keys and values may have
fewer), H head dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..autocast import autocast_dtype
from . import reference
from .dispatch import implementation_name
from .op import prefix_attention
from .tree import PrefixTree
from .validation import check_rows, check_tensors, check_tree, checked_scale

__all__ = ["PrefixTree", "implementation_name", "shared_prefix_attention"]


def shared_prefix_attention(
    query_TNH: Tensor,
    key_TNH: Tensor,
    value_TNH: Tensor,
    tree: PrefixTree,
    *,
    prefix_key_PNH: Tensor | None = None,
    prefix_value_PNH: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention in which a token sees its own segment up to itself and all segments above.

        out_t = sum_s P_ts v_s,  P_t = softmax of scale * q_t . k_s over the s that t sees

    Args:
        query_TNH: [T, N, H] queries of the tree's segments one after the other, any strides.
        key_TNH, value_TNH: [T, N_kv, H], same dtype; N a multiple of N_kv. Query head n reads
            key/value head n // (N / N_kv).
        tree: the segments. Rotary position ids of the rows are `tree.position_of_T`.
        prefix_key_PNH, prefix_value_PNH: [P, N_kv, H], keys and values of the tree's first
            `tree.outside` segments one after the other, computed elsewhere, such as a live
            teacher's question. Differentiable too: leaf tensors here make a deferred prefix
            backward.
        scale: factor of the scores, default H ** -0.5.
        impl: "auto" (on CUDA flash_attn where installed, else torch; on CPUs native, else torch;
            reference where none can run), "native" (this package's C++ kernel for CPUs, fp32 and
            bf16), "torch" (ATen's flash kernels: any floating point on CPUs; bf16 or fp16 and head
            dims up to 256 in steps of 8 on CUDA), "flash_attn" (that package, CUDA) or "reference"
            (dense mask, any device and dtype). An explicit choice never falls back.

    Differentiable once in all five tensors (impl="reference": as often as one likes). On CPUs equal
    calls give equal bits, "native" on any number of threads; on CUDA the backward does so under
    torch.use_deterministic_algorithms(True). Under autocast the tensors are cast to the autocast
    dtype first.

    Returns: [T, N, H] in the query's dtype.

    Raises: ValueError or TypeError naming the argument, what was found and what was expected;
        RuntimeError with the reason for a named implementation that cannot run here.
    """
    check_tree(tree)
    device = query_TNH.device if isinstance(query_TNH, Tensor) else torch.device("cpu")
    dtype = autocast_dtype(device)
    given = (query_TNH, key_TNH, value_TNH, prefix_key_PNH, prefix_value_PNH)
    query_TNH, key_TNH, value_TNH, prefix_key_PNH, prefix_value_PNH = (
        _cast(tensor, dtype) for tensor in given
    )
    tensors = (query_TNH, key_TNH, value_TNH, prefix_key_PNH, prefix_value_PNH)
    check_tensors(*tensors)
    if not torch.compiler.is_compiling():  # the operator does; here it would fix the layout
        check_rows(query_TNH, prefix_key_PNH, tree)
    head_dim = index(query_TNH.shape[2])  # a constant, also where a compiler traces shapes
    factor = checked_scale(scale, head_dim)
    name = implementation_name(impl, device, query_TNH.dtype, head_dim)
    with nullcontext() if dtype is None else torch.autocast(device.type, enabled=False):
        if name == "reference":
            return reference.attention(*tensors, tree, factor)
        return prefix_attention(*tensors, tree.segments, tree.outside, factor, name)[0]


def _cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    """As autocast casts: not fp64, nor what is no floating point tensor (the checks speak up)."""
    if dtype is None or not isinstance(tensor, Tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
