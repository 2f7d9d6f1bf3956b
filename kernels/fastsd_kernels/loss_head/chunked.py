"""Plan A in plain torch, any device: token chunk x full vocabulary, gradient formed in the forward.

A chunk of rows of both streams is projected on all V columns (two GEMMs into two scratch buffers),
each row's loss, statistics and gradient in its logits are computed, the gradient overwrites the
student's scratch, and two GEMMs turn it into d student_TD and d head_VD. So a token costs four
GEMMs (three with a frozen head, two without gradient) against the six to eight of a forward and
a recomputing backward, and no [T, V] tensor exists. The price: the loss is a scalar whose gradient
the backward pass only scales.

The row mathematics goes over tiles of a few rows that stay in cache; GEMMs want many rows.
bf16 operands give fp32 logits: rounding logits to bf16 costs 3-5 % in the gradient.
Shape suffixes: T rows (of a chunk within one), D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Evaluation, Inputs, Options, RowStatistics
from .products import Products
from .tile import Rows, row_tile

# Bytes of logits scratch, and logits in one tile of the row mathematics, by device type.
SCRATCH_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
TILE_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 26}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: it runs on any device, with any floating point dtype."""
    return None


def statistics(inputs: Inputs, options: Options) -> RowStatistics:
    """The statistics alone, by the same pass without gradients."""
    return evaluate(inputs, options, (False, False, False)).statistics


def evaluate(inputs: Inputs, options: Options, wanted: tuple[bool, bool, bool]) -> Evaluation:
    """Loss, statistics and the wanted gradients; see contract.py."""
    rows, vocabulary = inputs.student_TD.shape[0], inputs.head_VD.shape[0]
    dtype, device = inputs.statistics_dtype, inputs.student_TD.device
    streams = 1 if inputs.teacher_TD is None else 2
    chunk = _rows_per_chunk(rows, streams * vocabulary * dtype.itemsize, device)
    tile = min(chunk, max(1, _for_device(TILE_LOGITS, device) // vocabulary))
    scratch = [torch.empty(chunk, vocabulary, dtype=dtype, device=device) for _ in range(streams)]
    spare = [torch.empty(tile, vocabulary, dtype=dtype, device=device) for _ in range(3)]
    products = Products(inputs, wanted)
    parts = []
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        logits = [z[: stop - start] for z in scratch]
        products.project(logits, start, stop)
        for first in range(start, stop, tile):
            last = min(first + tile, stop)
            here = [z[first - start : last - start] for z in logits]
            work = [x[: last - first] for x in spare]
            parts.append(row_tile(here, _rows(inputs, first, last), options, any(wanted), work))
        free = logits[1] if streams == 2 else None
        products.add_gradients(logits[0], free, start, stop)
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    loss = found.pop("loss_T").sum()
    d_student_TD, d_head_VD, d_bias_V = products.gradients()
    return Evaluation(loss, RowStatistics(**found), (d_student_TD, d_head_VD, d_bias_V))


def _rows_per_chunk(rows: int, bytes_per_row: int, device: torch.device) -> int:
    """The fewest chunks that fit the scratch, of equal size."""
    most = max(1, _for_device(SCRATCH_BYTES, device) // bytes_per_row)
    chunks = -(-rows // most)
    return -(-rows // chunks)


def _for_device(table: dict[str, int], device: torch.device) -> int:
    return table["cpu" if device.type == "cpu" else "cuda"]


def _rows(inputs: Inputs, first: int, last: int) -> Rows:
    def span(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[first:last]

    return Rows(
        inputs.target_T[first:last],
        span(inputs.divergence_weight_T),
        span(inputs.policy_weight_T),
        span(inputs.old_logprob_T),
        span(inputs.entropy_weight_T),
    )
