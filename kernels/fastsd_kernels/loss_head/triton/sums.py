"""The nine sums of a row, from which `finish.py` makes its statistics: columns and memory.

Both plans fill them, the scratch's row kernel and the tile that keeps no logits. Of either
stream, with d = z_s - z_t:

    MOST    m = max z                        MASS    S = sum e^(z - m)
    GAP     U = sum e^(z - m) (d - shift)    TARGET  z[y]
    ENERGY  E = sum e^(z_s - m) (z_s - m); the tile leaves sum e^(z_s - m) z_s (fused.py)

Shape suffixes: T rows, 9 the sums, P vocabulary splits.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

STUDENT_MOST = tl.constexpr(0)
STUDENT_MASS = tl.constexpr(1)
STUDENT_GAP = tl.constexpr(2)
STUDENT_ENERGY = tl.constexpr(3)
TEACHER_MOST = tl.constexpr(4)
TEACHER_MASS = tl.constexpr(5)
TEACHER_GAP = tl.constexpr(6)
STUDENT_TARGET = tl.constexpr(7)
TEACHER_TARGET = tl.constexpr(8)
SUMS = tl.constexpr(9)


def empty_sums(rows: int, like: Tensor) -> Tensor:
    """[rows, 9] fp32 on the device of `like`, a row's sums side by side."""
    return like.new_empty(rows, SUMS.value, dtype=torch.float32)


def empty_partial_sums(splits: int, rows: int, like: Tensor) -> Tensor:
    """[splits, 9, rows] fp32: of each vocabulary split, one sum of all rows side by side."""
    return like.new_empty(splits, SUMS.value, rows, dtype=torch.float32)
