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

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .contract import Inputs, Options, RowStatistics
from .products import Products
from .tile import Rows, row_tile

# Bytes of logits scratch, and logits in one tile of the row mathematics, by device type.
SCRATCH_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
TILE_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 26}


def loss(inputs: Inputs, options: Options) -> tuple[Tensor, RowStatistics]:
    differentiable = (inputs.student_TD, inputs.head_VD, inputs.bias_V)
    train = torch.is_grad_enabled()
    wanted = tuple(train and x is not None and x.requires_grad for x in differentiable)
    result = _run(inputs, options, wanted)
    return _ScaleGradients.apply(*differentiable, result), result.statistics


def statistics(inputs: Inputs, options: Options) -> RowStatistics:
    return _run(inputs, options, (False, False, False)).statistics


@dataclass(frozen=True)
class _Result:
    loss: Tensor
    statistics: RowStatistics
    gradients: tuple[Tensor | None, ...]


class _ScaleGradients(torch.autograd.Function):
    """Hands out gradients that are already there, times the upstream gradient."""

    @staticmethod
    def forward(ctx, student_TD, head_VD, bias_V, result):
        ctx.save_for_backward(*result.gradients)
        return result.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # On CPU the usual 1.0 saves a pass over [V, D]; on a GPU looking at it would be a sync.
        unscaled = upstream.device.type == "cpu" and upstream.item() == 1.0
        saved = (x if x is None or unscaled else x * upstream for x in ctx.saved_tensors)
        return *saved, None


def _run(inputs: Inputs, options: Options, wanted: tuple[bool, ...]) -> _Result:
    rows, vocabulary = inputs.student_TD.shape[0], inputs.head_VD.shape[0]
    dtype, device = inputs.statistics_dtype, inputs.student_TD.device
    streams = 1 if inputs.teacher_TD is None else 2
    chunk = _rows_per_chunk(rows, streams * vocabulary * dtype.itemsize, device)
    tile = min(chunk, max(1, _for_device(TILE_LOGITS, device) // vocabulary))
    scratch = [torch.empty(chunk, vocabulary, dtype=dtype, device=device) for _ in range(streams)]
    spare = [torch.empty(tile, vocabulary, dtype=dtype, device=device) for _ in range(3)]
    parts = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        products = Products(inputs, wanted)
        for start in range(0, rows, chunk) or (0,):
            stop = min(start + chunk, rows)
            logits = [z[: stop - start] for z in scratch]
            products.project(logits, start, stop)
            for first in range(start, stop, tile) or (start,):
                last = min(first + tile, stop)
                here = [z[first - start : last - start] for z in logits]
                work = [x[: last - first] for x in spare]
                parts.append(row_tile(here, _rows(inputs, first, last), options, any(wanted), work))
            free = logits[1] if streams == 2 else None
            products.add_gradients(logits[0], free, start, stop)
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        total = found.pop("loss_T").sum()
        return _Result(total, RowStatistics(**found), products.gradients())


def _rows_per_chunk(rows: int, bytes_per_row: int, device: torch.device) -> int:
    """The fewest chunks that fit the scratch, of equal size."""
    most = max(1, _for_device(SCRATCH_BYTES, device) // bytes_per_row)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


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
