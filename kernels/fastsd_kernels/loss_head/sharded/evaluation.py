"""One shard's part of the loss head: token chunk x shard scratch, two gathers and at most one sum.

A chunk of rows of both streams is projected on the shard; two gathers of a few numbers a row merge
what softmax needs to know of the other shards (top-k: k candidates of both streams besides):

    1  m, S and z[y] of both streams                  6 columns
    2  parts of H, of D and of sum(F), see rows.py    4 columns

With them every row's loss is the same to the bit on all ranks and every entry's gradient is
complete: four GEMMs with the shard, as without shards. d head_shard_VD needs no other rank.
d student_TD is the sum of the ranks' parts, taken in the statistics' dtype and rounded once: the
parts share the head's mean direction, which cancels in their sum only, so each rank's rounding to
bf16 would weigh more than the sum's.
Shape suffixes: T rows (of a chunk), D hidden size, V vocabulary entries of the shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Evaluation, Inputs, Options, RowStatistics
from ..products import Products, _bf16_arithmetic
from ..rows import policy_terms
from .agreement import Call
from .rows import (
    Divergence,
    Merged,
    Terms,
    first_sums,
    merge_first,
    merge_second,
    scale_,
    second_sums,
    write_gradient,
)
from .softmax import Columns, add_up

# Bytes of logits scratch of a rank, and logits in one tile of the row mathematics, by device type.
SCRATCH_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
TILE_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 26}


def evaluate_shard(call: Call, wanted: tuple[bool, ...], reduce_hidden: bool) -> Evaluation:
    """Loss and statistics of the whole vocabulary, gradients of this shard (contract.py)."""
    with torch.autocast(call.rows.inputs.student_TD.device.type, enabled=False):
        return _Evaluator(call, wanted, reduce_hidden).run()


class _Evaluator:
    def __init__(self, call: Call, wanted: tuple[bool, ...], reduce_hidden: bool):
        self._call, self._inputs, self._options = call, call.rows.inputs, call.options
        self._gradient, self._reduce_hidden = any(wanted), reduce_hidden
        hidden_TD, dtype = self._inputs.student_TD, self._inputs.statistics_dtype
        streams = 1 if self._inputs.teacher_TD is None else 2
        device = "cpu" if hidden_TD.device.type == "cpu" else "cuda"
        row_bytes = streams * call.largest * dtype.itemsize
        chunk = _rows_per_chunk(hidden_TD.shape[0], row_bytes, SCRATCH_BYTES[device])
        tile = min(chunk, max(1, TILE_LOGITS[device] // call.shard.size))
        like = {"dtype": dtype, "device": hidden_TD.device}
        self._scratch = [torch.empty(chunk, call.shard.size, **like) for _ in range(streams)]
        self._spare = [torch.empty(tile, call.shard.size, **like) for _ in range(3)]
        self._chunk, self._tile = chunk, tile
        self._products = _Products(self._inputs, wanted)
        self._d_student_TD = torch.empty_like(hidden_TD) if wanted[0] else None

    def run(self) -> Evaluation:
        """All rows, chunk by chunk; every rank makes the same chunks."""
        rows = self._inputs.student_TD.shape[0]
        # No rows still have a loss of 0 and gradients of zeros.
        starts = range(0, rows, self._chunk) if rows else (0,)
        parts = [self._evaluate(start, min(start + self._chunk, rows)) for start in starts]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        loss = found.pop("loss_T").sum()
        _, d_head_VD, d_bias_V = self._products.gradients()
        gradients = (self._d_student_TD, d_head_VD, d_bias_V)
        return Evaluation(loss, RowStatistics(**found), gradients)

    def _evaluate(self, start: int, stop: int) -> Columns:
        """One chunk: loss and statistics by row; its gradients are added to the products."""
        chunk = _Chunk(self._inputs, start, stop)
        logits = [z_TV[: stop - start] for z_TV in self._scratch]
        self._products.project(logits, start, stop)
        merged = self._first(logits, chunk)
        divergence, entropy_T = self._second(logits, merged)
        found, terms = _row_terms(chunk, merged, divergence, entropy_T, self._options)
        if self._gradient:
            for here, spare, span in self._tiles(logits):
                here_terms = _rows_of(terms, span)
                write_gradient(here, here_terms, self._call.shard, self._options, spare)
            self._add_gradients(logits, start, stop)
        return found

    def _first(self, logits: list[Tensor], chunk: _Chunk) -> Merged:
        parts, indices = [], []
        for here, spare, span in self._tiles(logits):
            for z_TV in here:
                scale_(z_TV, self._options)
            target_T = chunk.target_T[span]
            sums, index_TK = first_sums(here, target_T, self._call.shard, self._options, spare)
            parts.append(sums)
            indices.append(index_TK)
        index_TK = None if indices[0] is None else torch.cat(indices)
        return merge_first(self._gather(parts), index_TK, self._call.shard)

    def _second(self, logits: list[Tensor], merged: Merged) -> tuple[Divergence | None, Tensor]:
        parts = []
        for here, spare, span in self._tiles(logits):
            state = _rows_of(merged, span)
            parts.append(second_sums(here, state, self._options, self._gradient, spare))
        sums = self._gather(parts)
        entropy_T = add_up(sums.pop("entropy"))
        return merge_second(sums, merged, self._options, self._gradient), entropy_T

    def _gather(self, parts: list[Columns]) -> Columns:
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._call.ranks.gather(columns)

    def _tiles(self, logits: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor], slice]]:
        """Logits and work space of a few rows that stay in cache."""
        rows = logits[0].shape[0]
        for first in range(0, rows, self._tile) if rows else (0,):
            span = slice(first, min(first + self._tile, rows))
            spare = [x_TV[: span.stop - span.start] for x_TV in self._spare]
            yield [z_TV[span] for z_TV in logits], spare, span

    def _add_gradients(self, logits: list[Tensor], start: int, stop: int) -> None:
        free = logits[1] if len(logits) == 2 else None
        self._products.add_gradients(logits[0], free, start, stop)
        if self._d_student_TD is not None:
            part_TD = self._products.hidden_part(logits[0])
            if self._reduce_hidden:
                self._call.ranks.sum_(part_TD)
            self._d_student_TD[start:stop] = part_TD


class _Products(Products):
    """Products whose d student_TD is handed out by chunk, before it is rounded."""

    def __init__(self, inputs: Inputs, wanted: tuple[bool, ...]):
        super().__init__(inputs, (False, *wanted[1:]))

    def hidden_part(self, g_TV: Tensor) -> Tensor:
        """g W of the shard in the statistics' dtype; bf16 operands for bf16 inputs."""
        if self._mixed_cuda:
            return torch.mm(g_TV.to(torch.bfloat16), self._head, out_dtype=g_TV.dtype)
        with _bf16_arithmetic(self._mixed_cpu):
            return torch.mm(g_TV, self._head)


class _Chunk:
    """Targets and weights of the rows of one chunk, as in `Inputs`."""

    def __init__(self, inputs: Inputs, start: int, stop: int):
        def span(x_T: Tensor | None) -> Tensor | None:
            return None if x_T is None else x_T[start:stop]

        self.target_T = inputs.target_T[start:stop]
        self.divergence_weight_T = span(inputs.divergence_weight_T)
        self.policy_weight_T = span(inputs.policy_weight_T)
        self.old_logprob_T = span(inputs.old_logprob_T)
        self.entropy_weight_T = span(inputs.entropy_weight_T)


def _row_terms(
    chunk: _Chunk,
    merged: Merged,
    divergence: Divergence | None,
    entropy_T: Tensor,
    options: Options,
) -> tuple[Columns, Terms]:
    """Loss and statistics by row, and what the gradient needs."""
    logprob_T = merged.logprob_T
    found = {"student_logprob_T": logprob_T, "entropy_T": entropy_T}
    loss_T, pull_T = torch.zeros_like(logprob_T), None
    weight_T = chunk.divergence_weight_T
    if divergence is not None:
        weight_T = torch.ones_like(logprob_T) if weight_T is None else weight_T
        found |= {"teacher_logprob_T": merged.teacher_logprob_T, "divergence_T": divergence.value_T}
        if divergence.clipped_T is not None:
            found["entry_clipped_T"] = divergence.clipped_T.to(torch.int64)
        weighted_T = weight_T * divergence.value_T
        if options.divergence == "sampled_token":
            pull_T = weighted_T
            weighted_T = pull_T * logprob_T
        loss_T += weighted_T
    if chunk.policy_weight_T is not None:
        policy_T, slope_T, clipped_T = policy_terms(
            logprob_T, chunk.policy_weight_T, chunk.old_logprob_T, options.clip
        )
        loss_T += policy_T
        pull_T = slope_T if pull_T is None else pull_T + slope_T
        if clipped_T is not None:
            found["policy_clipped_T"] = clipped_T
    if chunk.entropy_weight_T is not None:
        loss_T -= chunk.entropy_weight_T * entropy_T
    found["loss_T"] = loss_T
    terms = Terms(
        chunk.target_T, merged, divergence, entropy_T, weight_T, pull_T, chunk.entropy_weight_T
    )
    return {name: x_T for name, x_T in found.items() if x_T is not None}, terms


def _rows_of(state: Any, span: slice) -> Any:
    """The rows `span` of every tensor of a (nested) NamedTuple."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else state[span]
    return type(state)(*(_rows_of(field, span) for field in state))


def _rows_per_chunk(rows: int, row_bytes: int, scratch_bytes: int) -> int:
    """The fewest chunks that fit the scratch, of equal size."""
    most = max(1, scratch_bytes // row_bytes)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))
