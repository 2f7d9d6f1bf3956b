"""Softmax over a vocabulary in parts: each sends m = max z and S = sum e^(z - m) of its entries.

The whole has m = max m_r and S = sum S_r e^(m_r - m), added in the order of the ranks: the same
bits on every rank. Shape suffixes: R ranks, T rows, V vocabulary entries of the shard, K columns.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

# The maximum of no entries: finite, so that differences of maxima are.
LOWEST = -1e30

Columns = dict[str, Tensor]


class Softmax(NamedTuple):
    """Merged denominators of one stream: p = e^(z - most) / total."""

    most_T1: Tensor
    total_T1: Tensor

    @classmethod
    def merged(cls, parts: Columns, stream: str) -> Softmax:
        """From every rank's `exponentials`, [R, T]."""
        most_RT, total_RT = parts[f"{stream} most"], parts[f"{stream} total"]
        most_T = most_RT.amax(0)
        total_T = add_up(total_RT * (most_RT - most_T).exp())
        return cls(most_T[:, None], total_T[:, None])

    def log_probabilities(self, z_TK: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.sub(z_TK, self.most_T1, out=out).sub_(self.total_T1.log())

    def probabilities(self, z_TK: Tensor, out: Tensor) -> Tensor:
        return torch.sub(z_TK, self.most_T1, out=out).exp_().div_(self.total_T1)


def exponentials(stream: str, z_TV: Tensor, spare_TV: Tensor) -> Columns:
    """The shard's m and S; an entry of -inf is none."""
    most_T1 = z_TV.amax(-1, True).clamp_(min=LOWEST)
    total_T = torch.sub(z_TV, most_T1, out=spare_TV).exp_().sum(-1)
    return {f"{stream} most": most_T1[:, 0], f"{stream} total": total_T}


def add_up(parts: Tensor) -> Tensor:
    """[R, ...] summed in the order of the ranks."""
    return reduce(torch.add, parts.unbind(0))
