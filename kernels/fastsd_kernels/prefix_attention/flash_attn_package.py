"""The flash-attn package (2.7 or later) as a partial kernel, where it is installed.

Shapes: C rows of a call, L its keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .contract import Part
from .cuda_flash import flash_limits
from .plan import Call, Packing, level_calls
from .tree import PrefixTree


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where it can run, else the reason and what to do."""
    reason = flash_limits(device, dtype, head_dim)
    if reason is not None:
        return reason
    try:
        package = _package()
    except ImportError as error:
        return f"{error}; pip install flash-attn, or use impl='torch'"
    if not hasattr(package, "_flash_attn_varlen_backward"):
        return "this flash-attn has no variable-length backward; install flash-attn 2.7 or later"
    return None


def calls(tree: PrefixTree, device: torch.device) -> tuple[Call, ...]:
    """One call per level of the tree."""
    return level_calls(tree, device)


def forward(
    query_CNH: Tensor, key_LKH: Tensor, value_LKH: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor]:
    """out_CNH, lse_CN."""
    out_CNH, lse_NC, *_ = _package()._flash_attn_varlen_forward(
        query_CNH,
        key_LKH,
        value_LKH,
        **_packing(call),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=call.causal,
    )
    return out_CNH, lse_NC.T


def backward(part: Part, call: Call, scale: float) -> tuple[Tensor, ...]:
    """The call's part of dq_CNH, dk_LKH and dv_LKH."""
    *tensors, lse_CN = part
    gradients = tuple(map(torch.empty_like, (part.query_CNH, part.key_LKH, part.value_LKH)))
    _package()._flash_attn_varlen_backward(
        *tensors,
        lse_CN.T.contiguous(),
        *gradients,
        **_packing(call),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=call.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return gradients


def _packing(call: Call) -> dict[str, Any]:
    packing = call.packing
    assert isinstance(packing, Packing)
    return {
        "cu_seqlens_q": packing.query_starts,
        "cu_seqlens_k": packing.key_starts,
        "max_seqlen_q": packing.longest_query,
        "max_seqlen_k": packing.longest_key,
    }


@cache
def _package() -> Any:
    return import_module("flash_attn.flash_attn_interface")
