"""What a partial attention kernel receives and returns: `cpu_flash`, `cuda_flash`, flash-attn's.

Such a module knows one part of a tree at a time (`plan.py`); `merged.py` puts the parts together.
Shapes: C rows of a call, L its keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .plan import Call
from .tree import PrefixTree


class Part(NamedTuple):
    """What a backward call reads: a call's rows, with the output and lse of all of their keys."""

    grad_CNH: Tensor
    query_CNH: Tensor
    key_LKH: Tensor
    value_LKH: Tensor
    out_CNH: Tensor
    lse_CN: Tensor


class Kernel(Protocol):
    """The functions of such a module."""

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """None where it can run, else the reason and what to do."""
        ...

    def calls(self, tree: PrefixTree, device: torch.device) -> tuple[Call, ...]:
        """The tree as calls of this kernel."""
        ...

    def forward(
        self, query_CNH: Tensor, key_LKH: Tensor, value_LKH: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out_CNH of the query's dtype or wider, lse_CN in fp32 or better."""
        ...

    def backward(self, part: Part, call: Call, scale: float) -> tuple[Tensor, ...]:
        """The call's part of dq_CNH, dk_LKH and dv_LKH, of the query's dtype or wider."""
        ...
