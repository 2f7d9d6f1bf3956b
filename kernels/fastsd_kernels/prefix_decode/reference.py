"""The definition: every row's keys and values as one list, softmax attention in fp32 or better.

    out_b = sum_s P_s v_s,   P = softmax over s of scale * q_b . k_s
    s runs over the row's prefix, its own positions before this one, and this one

Shapes: B rows, N query heads, K key/value heads, R = N / K, H head dim, L positions of a prefix,
T of a branch, S = L + T + 1 positions that a row sees.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .contract import Layers


def attention(query_NH: Tensor, key_KSH: Tensor, value_KSH: Tensor, scale: float) -> Tensor:
    """One row: [N, H] in the query's dtype."""
    wide = torch.promote_types(query_NH.dtype, torch.float32)
    query_KRH = query_NH.to(wide).unflatten(0, (key_KSH.shape[0], -1))
    scores_KRS = torch.einsum("krh,ksh->krs", query_KRH, key_KSH.to(wide)) * scale
    out_KRH = torch.einsum("krs,ksh->krh", scores_KRS.softmax(-1), value_KSH.to(wide))
    return out_KRH.flatten(0, 1).to(query_NH.dtype)


class ReferenceDecode:
    """As `PrefixDecodeCache`, without checks; any dtype, memory that grows as needed."""

    def __init__(self):
        self.prefixes: dict[int, Layers] = {}
        # (layer, slot) -> the branch's keys and values, one [K, H] a position.
        self.branches: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}

    def admit(self, prefix: int, layers: Layers) -> None:
        """layers: per layer keys and values [K, L, H], kept as they are."""
        self.prefixes[prefix] = layers

    def drop(self, prefix: int) -> None:
        del self.prefixes[prefix]

    def begin(self, slot_B: np.ndarray, prefix_B: np.ndarray, length_B: np.ndarray) -> None:
        """Rows of the next step: [B] int64 each."""
        self.rows = list(zip(slot_B.tolist(), prefix_B.tolist(), length_B.tolist(), strict=True))

    def attend(
        self, layer: int, query_BNH: Tensor, key_BKH: Tensor, value_BKH: Tensor, scale: float
    ) -> Tensor:
        """[B, N, H] in the query's dtype."""
        given = key_BKH, value_BKH
        out = []
        for row, (slot, prefix, length) in enumerate(self.rows):
            branch = self.branches.setdefault((layer, slot), ([], []))
            seen = []
            for which in range(2):
                del branch[which][length:]
                branch[which].append(given[which][row])
                parts = self.prefixes[prefix][layer][which], torch.stack(branch[which], 1)
                seen.append(torch.cat(parts, 1))
            out.append(attention(query_BNH[row], seen[0], seen[1], scale))
        return torch.stack(out)
