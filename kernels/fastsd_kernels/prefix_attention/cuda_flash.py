"""torch's own FlashAttention 2 for CUDA as a partial kernel, many runs in one launch.

Its backward is deterministic under torch.use_deterministic_algorithms(True), else it adds up dq
atomically.

Shapes: C rows of a call, L its keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Part
from .plan import Call, Packing, level_calls
from .tree import PrefixTree

DTYPES = (torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where it can run, else the reason and what to do."""
    return flash_limits(device, dtype, head_dim)


def flash_limits(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What every FlashAttention 2 asks of its inputs; None where they fit."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device.type}"
    if dtype not in DTYPES:
        return f"flash kernels take bf16 or fp16, not {dtype}; cast, or use impl='reference'"
    if head_dim % 8 or head_dim > 256:
        return f"flash kernels take head dims up to 256 in steps of 8, not {head_dim}"
    return None


def calls(tree: PrefixTree, device: torch.device) -> tuple[Call, ...]:
    """One call per level of the tree."""
    return level_calls(tree, device)


def forward(
    query_CNH: Tensor, key_LKH: Tensor, value_LKH: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor]:
    """out_CNH, lse_CN."""
    out_CNH, lse_NC, *_ = torch.ops.aten._flash_attention_forward(
        query_CNH,
        key_LKH,
        value_LKH,
        *_packing(call),
        0.0,
        call.causal,
        False,
        scale=scale,
    )
    return out_CNH, lse_NC.T


def backward(part: Part, call: Call, scale: float) -> tuple[Tensor, ...]:
    """The call's part of dq_CNH, dk_LKH and dv_LKH."""
    *tensors, lse_CN = part
    no_dropout_state = part.query_CNH.new_empty(0, dtype=torch.int64)
    return torch.ops.aten._flash_attention_backward(
        *tensors,
        lse_CN.T.contiguous(),
        *_packing(call),
        0.0,
        call.causal,
        no_dropout_state,
        no_dropout_state,
        scale=scale,
    )


def _packing(call: Call) -> tuple[Tensor, Tensor, int, int]:
    packing = call.packing
    assert isinstance(packing, Packing)
    return packing.query_starts, packing.key_starts, packing.longest_query, packing.longest_key
