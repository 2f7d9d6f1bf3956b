"""The nine sums of a row, from which `finish.py` makes its statistics: columns and memory.

Both plans fill them, the scratch's row kernel and the tile that keeps no logits. Of the student
(S) and the teacher (T), with d = z_s - z_t:

    MOST    m = max z                        MASS    S = sum e^(z - m)
    GAP     U = sum e^(z - m) (d - shift)    TARGET  z[y]
    ENERGY  E = sum e^(z_s - m) (z_s - m); the tile leaves sum e^(z_s - m) z_s (fused.py)

Shape suffixes: T rows, 9 the sums, P vocabulary splits.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

MOST_S = tl.constexpr(0)
MASS_S = tl.constexpr(1)
GAP_S = tl.constexpr(2)
ENERGY_S = tl.constexpr(3)
MOST_T = tl.constexpr(4)
MASS_T = tl.constexpr(5)
GAP_T = tl.constexpr(6)
TARGET_S = tl.constexpr(7)
TARGET_T = tl.constexpr(8)
SUMS = tl.constexpr(9)


def empty_sums(rows: int, like: Tensor) -> Tensor:
    """[rows, 9] fp32 on the device of `like`, a row's sums side by side."""
    return like.new_empty(rows, SUMS.value, dtype=torch.float32)


def empty_partial_sums(splits: int, rows: int, like: Tensor) -> Tensor:
    """[splits, 9, rows] fp32: of each vocabulary split, one sum of all rows side by side."""
    return like.new_empty(splits, SUMS.value, rows, dtype=torch.float32)
