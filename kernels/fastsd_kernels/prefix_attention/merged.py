"""Partial attentions merged into one, forward and backward.

A call i over some of a row's keys returns its softmax average o_i and l_i = log sum exp of its
scores. All keys together:

    l = log sum_i exp(l_i),    o = sum_i exp(l_i - l) o_i

With P = exp(score - l) every gradient of attention is a sum over keys,

    dS = P (dO . v - dO . o),  dq = scale sum dS k,  dk = scale sum dS q,  dv = sum P dO

so a kernel's own backward, given the merged o and l in place of its own, returns exactly the
part of the sum that its keys have. Composing calls by autograd instead needs the gradient of l_i,
which flash kernels drop.

Shapes: T tokens of the pack, P of the prefixes from outside, N query heads, K key/value heads,
H head dim, C rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Kernel, Part
from .plan import Call, Rows


class Tensors(NamedTuple):
    """What attention reads; prefixes [0, K, H] where there are none."""

    query_TNH: Tensor
    key_TKH: Tensor
    value_TKH: Tensor
    prefix_key_PKH: Tensor
    prefix_value_PKH: Tensor

    def of(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """The query, key and value rows of a call; views where they are one run."""
        key, value = self[3:] if call.outside else self[1:3]
        return self.query_TNH[call.queries], key[call.keys], value[call.keys]


def forward(
    kernel: Kernel, tensors: Tensors, calls: Sequence[Call], scale: float
) -> tuple[Tensor, Tensor]:
    """out_TNH in the query's dtype, lse_TN in fp32 or better."""
    query_TNH = tensors.query_TNH
    wide = torch.promote_types(query_TNH.dtype, torch.float32)
    out_TNH = query_TNH.new_zeros(query_TNH.shape, dtype=wide)
    lse_TN = query_TNH.new_full(query_TNH.shape[:2], float("-inf"), dtype=wide)
    for call in calls:
        part_CNH, part_lse_CN = kernel.forward(*tensors.of(call), call, scale)
        _merge(out_TNH, lse_TN, call.queries, part_CNH.to(wide), part_lse_CN)
    return out_TNH.to(query_TNH.dtype), lse_TN


def _merge(
    out_TNH: Tensor, lse_TN: Tensor, rows: Rows, part_CNH: Tensor, part_lse_CN: Tensor
) -> None:
    out_CNH, lse_CN = out_TNH[rows], lse_TN[rows]
    weight_CN = torch.sigmoid(part_lse_CN - lse_CN)  # exactly 1 on a row's first part
    out_CNH.lerp_(part_CNH, weight_CN[..., None])
    torch.logaddexp(lse_CN, part_lse_CN, out=lse_CN)
    if not isinstance(rows, slice):  # a copy, not a view
        out_TNH[rows], lse_TN[rows] = out_CNH, lse_CN


def backward(
    kernel: Kernel,
    grad_TNH: Tensor,
    tensors: Tensors,
    out_TNH: Tensor,
    lse_TN: Tensor,
    calls: Sequence[Call],
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of the five tensors, in their dtypes."""
    wide = lse_TN.dtype
    d_query, *d_others = (x.new_zeros(x.shape, dtype=wide) for x in tensors)
    for call in calls:
        rows = call.queries
        part = Part(grad_TNH[rows], *tensors.of(call), out_TNH[rows], lse_TN[rows])
        parts = kernel.backward(part, call, scale)
        d_key, d_value = d_others[2:] if call.outside else d_others[:2]
        d_query[rows] += parts[0]
        d_key[call.keys] += parts[1]
        d_value[call.keys] += parts[2]
    return tuple(x.to(like.dtype) for x, like in zip((d_query, *d_others), tensors, strict=True))
