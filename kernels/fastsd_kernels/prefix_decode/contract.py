"""What the cache and its implementations agree on.

Shapes: B rows, N query heads, K key/value heads, H head dim, L positions of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Layers = Sequence[tuple[Tensor, Tensor]]


class CacheShape(NamedTuple):
    """Sizes of the cache; dtype of queries, keys, values and results."""

    layers: int
    kv_heads: int
    head_dim: int
    slots: int
    max_new_tokens: int
    dtype: torch.dtype


class Decoder(Protocol):
    """An implementation; its arguments were checked by the cache.

    One step is `begin` and then `attend` once for every layer. See `PrefixDecodeCache`.
    """

    def admit(self, prefix: int, layers: Layers) -> None:
        """Keeps a prompt: per layer keys and values [K, L, H] each, of the cache's dtype, any
        strides. Raises MemoryError."""
        ...

    def drop(self, prefix: int) -> None:
        """Forgets a prompt that is there."""
        ...

    def begin(self, slot_B: np.ndarray, prefix_B: np.ndarray, length_B: np.ndarray) -> None:
        """Names the B rows of the next step: [B] int64 each, rows of one prefix side by side.

        length_B: positions that the row's branch holds, where its new one goes.
        """
        ...

    def attend(
        self, layer: int, query_BNH: Tensor, key_BKH: Tensor, value_BKH: Tensor, scale: float
    ) -> Tensor:
        """Stores [B, K, H] keys and values of the new positions and returns their attention,
        [B, N, H] in the query's dtype. Raises MemoryError."""
        ...
