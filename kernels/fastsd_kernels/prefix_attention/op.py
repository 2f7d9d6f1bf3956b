"""Shared-prefix attention as PyTorch operators, forward and backward.

The tree travels as a [2, S] tensor of lengths and parents, so a compiled graph serves every layout;
what is traced are shapes. Everything that depends on the tree's values happens inside.

Autograd keeps the inputs, the merged output and the merged lse: nothing per call.

Shapes: T tokens of the pack, P of the prefixes from outside, N query heads, K key/value heads,
H head dim, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import dispatch, merged, native
from .tree import PrefixTree
from .validation import check_rows, check_tensors, checked_scale

_INPUTS = (
    "Tensor query_TNH, Tensor key_TNH, Tensor value_TNH, Tensor? prefix_key_PNH, "
    "Tensor? prefix_value_PNH"
)
_TREE = "Tensor segments_2S, int outside, float scale, str impl"
_FORWARD = f"({_INPUTS}, {_TREE}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_TNH, {_INPUTS}, Tensor out_TNH, Tensor lse_TN, {_TREE}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _run_forward(
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKH: Tensor,
    prefix_key_PKH: Tensor | None,
    prefix_value_PKH: Tensor | None,
    segments_2S: Tensor,
    outside: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out_TNH, lse_TN."""
    tree = _tree(segments_2S, outside)
    given = (query_TNH, key_TKH, value_TKH, prefix_key_PKH, prefix_value_PKH)
    check_tensors(*given)
    checked_scale(scale, query_TNH.shape[-1])
    check_rows(query_TNH, prefix_key_PKH, tree)
    kernel: Any = dispatch.kernel(impl, query_TNH.device)
    dispatch.implementation_name(impl, query_TNH.device, query_TNH.dtype, query_TNH.shape[2])
    if kernel is native:
        return native.forward(_tensors(*given), tree, scale)
    calls = kernel.calls(tree, query_TNH.device)
    return merged.forward(kernel, _tensors(*given), calls, scale)


prefix_attention = torch.library.custom_op(
    "fastsd_kernels::prefix_attention", _run_forward, mutates_args=(), schema=_FORWARD
)


@prefix_attention.register_fake
def _(query_TNH: Tensor, *rest) -> tuple[Tensor, Tensor]:
    check_tensors(query_TNH, *rest[:4])
    wide = torch.promote_types(query_TNH.dtype, torch.float32)
    lse_TN = query_TNH.new_empty(query_TNH.shape[:2], dtype=wide)
    return query_TNH.new_empty(query_TNH.shape), lse_TN


def _run_backward(
    grad_TNH: Tensor,
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKH: Tensor,
    prefix_key_PKH: Tensor | None,
    prefix_value_PKH: Tensor | None,
    out_TNH: Tensor,
    lse_TN: Tensor,
    segments_2S: Tensor,
    outside: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, ...]:
    """Gradients of the five inputs; without prefixes those of [0, K, H] tensors."""
    kernel: Any = dispatch.kernel(impl, query_TNH.device)
    tree = _tree(segments_2S, outside)
    tensors = _tensors(query_TNH, key_TKH, value_TKH, prefix_key_PKH, prefix_value_PKH)
    grad_TNH = _dense_rows(grad_TNH)
    if kernel is native:
        return native.backward(grad_TNH, tensors, out_TNH, lse_TN, tree, scale)
    calls = kernel.calls(tree, query_TNH.device)
    return merged.backward(kernel, grad_TNH, tensors, out_TNH, lse_TN, calls, scale)


prefix_attention_backward = torch.library.custom_op(
    "fastsd_kernels::prefix_attention_backward",
    _run_backward,
    mutates_args=(),
    schema=_BACKWARD,
)


@prefix_attention_backward.register_fake
def _(grad_TNH: Tensor, *rest) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in _tensors(*rest[:5]))


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, segments_2S, ctx.outside, ctx.scale, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, segments_2S)


def _differentiate(ctx, grad_TNH: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "shared_prefix_attention is differentiable once and was asked for a gradient with "
            "create_graph=True; leave create_graph out, or use impl='reference'"
        )
    if grad_TNH is None:
        return (None,) * 9
    gradients = prefix_attention_backward(
        grad_TNH, *ctx.saved_tensors, ctx.outside, ctx.scale, ctx.impl
    )
    wanted = ctx.needs_input_grad[:5]
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 4


prefix_attention.register_autograd(_differentiate, setup_context=_keep)


def _tensors(
    query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, *prefixes: Tensor | None
) -> merged.Tensors:
    """As kernels take them: heads of adjacent numbers, prefixes that may be of no rows."""
    given = [key_TKH[:0] if prefix is None else prefix for prefix in prefixes]
    return merged.Tensors(*map(_dense_rows, (query_TNH, key_TKH, value_TKH, *given)))


def _dense_rows(x_TNH: Tensor) -> Tensor:
    return x_TNH if x_TNH.stride(-1) == 1 else x_TNH.contiguous()


def _tree(segments_2S: Tensor, outside: int) -> PrefixTree:
    lengths, parents = segments_2S.tolist()
    return _cached_tree(tuple(lengths), tuple(parents), outside)


@lru_cache(maxsize=16)
def _cached_tree(lengths: Sequence[int], parents: Sequence[int], outside: int) -> PrefixTree:
    """One object per layout: every layer of a model asks for the same one."""
    return PrefixTree(lengths, [None if parent < 0 else parent for parent in parents], outside)
