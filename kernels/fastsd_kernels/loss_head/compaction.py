"""Rows that do not count are dropped before any GEMM, and results put back at their rows.

Dropping needs the number of rows that count on the host. While a CUDA graph is captured that is
not to be had, so there the rows stay and are blanked: zero states, token 0, zero results.
Shape suffixes: T rows (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .contract import Inputs


@dataclass(frozen=True)
class Rows:
    """What an implementation is given.

    inputs: the rows that count, or all with the others blanked.
    index_T: where they are among all rows; None: all are here.
    blank_T: bool, the rows that were blanked; None: none.
    total: how many rows there are.
    """

    inputs: Inputs
    index_T: Tensor | None
    blank_T: Tensor | None
    total: int

    def spread(self, value: Tensor) -> Tensor:
        """[rows here, ...] -> [all rows, ...], zero where a row does not count."""
        if self.blank_T is not None:
            return _blanked(value, self.blank_T)
        if self.index_T is None:
            return value
        return value.new_zeros(self.total, *value.shape[1:]).index_copy_(0, self.index_T, value)


def keep_rows(inputs: Inputs, counts_T: Tensor | None, drop: bool) -> Rows:
    """The rows where counts_T (None: all) is true; the others dropped, or else blanked."""
    total = inputs.student_TD.shape[0]
    if counts_T is None:
        return Rows(inputs, None, None, total)
    if not drop:
        blank_T = ~counts_T
        return Rows(_by_row(inputs, lambda x: _blanked(x, blank_T)), None, blank_T, total)
    index_T = counts_T.nonzero()[:, 0]
    if index_T.shape[0] == total:
        return Rows(inputs, None, None, total)
    return Rows(_by_row(inputs, lambda x: x.index_select(0, index_T)), index_T, None, total)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, where no value may reach the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _by_row(inputs: Inputs, change) -> Inputs:
    by_row = {
        name: change(value)
        for name, value in vars(inputs).items()
        if value is not None and name.endswith(("_TD", "_T"))
    }
    return replace(inputs, **by_row)


def _blanked(value: Tensor, blank_T: Tensor) -> Tensor:
    return value.masked_fill(blank_T.view(-1, *[1] * (value.ndim - 1)), 0)
