"""torch's flash attention for CPUs as a partial kernel: ATen's forward, and backward on our lse.

It takes [batch, heads, rows, H] of any strides but the last, so the pack's slices go in uncopied,
and fewer key than query heads (torch >= 2.9), so no head is repeated. Its causal mask is "key index
<= query index" for any two lengths, as scaled_dot_product_attention documents.

Shapes: C rows of a call, L its keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Part
from .plan import Call, segment_calls
from .tree import PrefixTree

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The half precisions' backward has a fixed cost per head: up to 128 rows fp32 took 0.1 to 0.7 of
# its time (head dims 64 and 128, one core with bf16 instructions), from 256 rows on it took more.
_FEW_ROWS = 128


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where it can run, else the reason and what to do."""
    if dtype not in DTYPES:
        return f"torch's CPU kernel takes floating point numbers, not {dtype}; cast the tensors"
    return None


def calls(tree: PrefixTree, device: torch.device) -> tuple[Call, ...]:
    """One call per segment."""
    return segment_calls(tree)


def forward(
    query_CNH: Tensor, key_LKH: Tensor, value_LKH: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor]:
    """out_CNH, lse_CN."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *map(_heads_first, (query_CNH, key_LKH, value_LKH)), 0.0, call.causal, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].T


def backward(part: Part, call: Call, scale: float) -> tuple[Tensor, ...]:
    """The call's part of dq_CNH, dk_LKH and dv_LKH, of the query's dtype or wider."""
    *tensors, lse_CN = part
    if part.query_CNH.shape[0] <= _FEW_ROWS:
        tensors = [x.to(lse_CN.dtype) for x in tensors]
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(_heads_first, tensors), lse_CN.T[None], 0.0, call.causal, scale=scale
    )
    return tuple(gradient[0].transpose(0, 1) for gradient in gradients)


def _heads_first(x_CNH: Tensor) -> Tensor:
    return x_CNH.transpose(0, 1)[None]
