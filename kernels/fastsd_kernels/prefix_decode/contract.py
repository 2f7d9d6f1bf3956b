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
    layers: int
    kv_heads: int
    head_dim: int
    slots: int
    max_new_tokens: int
    dtype: torch.dtype


class Decoder(Protocol):
    """An implementation; its arguments were checked by the cache."""

    def admit(self, prefix: int, layers: Layers) -> None: ...

    def drop(self, prefix: int) -> None: ...

    def begin(self, slot_B: np.ndarray, prefix_B: np.ndarray, length_B: np.ndarray) -> None: ...

    def attend(
        self, layer: int, query_BNH: Tensor, key_BKH: Tensor, value_BKH: Tensor, scale: float
    ) -> Tensor: ...
