"""Kernels for on-policy self-distillation that any codebase can import.

Names are re-exported lazily: importing the package costs next to nothing and pulls in neither
triton nor transformers. Tensors in, tensors out; no trainer types.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loss_head import (
        LossHeadOutput,
        LossHeadStatistics,
        fused_linear_loss,
        fused_linear_statistics,
    )
    from .loss_head.sharded import (
        vocabulary_sharded_linear_loss,
        vocabulary_sharded_linear_statistics,
    )
    from .packed_linear import PackedLinear
    from .prefix_attention import PrefixTree, shared_prefix_attention
    from .prefix_decode import PrefixDecodeCache
    from .sampling import sample_from_logits, sample_tokens

_HOME = {
    "fused_linear_loss": "loss_head",
    "fused_linear_statistics": "loss_head",
    "LossHeadOutput": "loss_head",
    "LossHeadStatistics": "loss_head",
    "vocabulary_sharded_linear_loss": "loss_head.sharded",
    "vocabulary_sharded_linear_statistics": "loss_head.sharded",
    "PrefixTree": "prefix_attention",
    "shared_prefix_attention": "prefix_attention",
    "PackedLinear": "packed_linear",
    "PrefixDecodeCache": "prefix_decode",
    "sample_from_logits": "sampling",
    "sample_tokens": "sampling",
}

__all__ = [
    "LossHeadOutput",
    "LossHeadStatistics",
    "PackedLinear",
    "PrefixDecodeCache",
    "PrefixTree",
    "fused_linear_loss",
    "fused_linear_statistics",
    "sample_from_logits",
    "sample_tokens",
    "shared_prefix_attention",
    "vocabulary_sharded_linear_loss",
    "vocabulary_sharded_linear_statistics",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
