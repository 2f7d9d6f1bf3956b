"""The loss head of many ranks: its weight gathered on each, or its vocabulary split over them.

Gathered, every rank multiplies its own rows by the whole head, which costs a copy of the head and
of its gradient per rank, and their transfer. Sharded, every rank multiplies the rows of all ranks
by the part of the head that it keeps anyway, and the row statistics are merged
(`fastsd_kernels.vocabulary_sharded_linear_loss`): the hidden states travel instead. That saves
memory, and time where a step has few tokens: its plain products are slower than the fused kernel.

Shapes: T response tokens of this rank's part, R of all ranks' parts, D hidden, V vocabulary; K
columns of numbers that belong to a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastsd.config import Config
from fastsd.errors import FastsdError
from fastsd.model import Policy
from fastsd.runtime.shards import local
from fastsd.runtime.world import World
from fastsd_kernels import vocabulary_sharded_linear_loss
from fastsd_kernels.loss_head import LossHeadOutput

Layout = Literal["gathered", "sharded"]

# Rows of a step for each rank, up to which the sharded head is worth its slower arithmetic: plain
# products against a fused kernel. On a CPU measured (bench/bench_sharded_head.py: as long at 64,
# 1.3 times as long at 256). On GPUs computed, and measured by nobody: half as much time again at
# 600 TFLOP/s against links of 300 GB/s; between machines it would be more.
LONGEST_ROWS = {"cpu": 64, "cuda": 4096}


class Head(NamedTuple):
    """What the choice depends on. compute_bytes: of one number; trains: it has a gradient; streams
    of hidden states: 2 with a teacher; heads: 2 where the teacher has weights of its own; device:
    "cpu" or "cuda"."""

    vocabulary: int
    compute_bytes: int
    tied: bool
    trains: bool
    streams: int
    heads: int
    device: str


def head_layout(config: Config, head: Head, ranks: int) -> tuple[Layout, str]:
    """How the loss head lies over the ranks under parallel.head, and why.

    "auto" shards a head where a step at its longest has few rows (LONGEST_ROWS) and moves fewer
    bytes so, counted for each hidden unit. Gathered: V rows of each head in the compute type once,
    and of its gradient in every micro-batch. Sharded: R rows of each stream, and of the student's
    gradient in fp32 twice, for it is all-reduced. A head tied to the embedding is gathered with it
    in any case.

    Raises FastsdError for a sharded head with loss.impl, for it has one implementation, and with
    more ranks than the vocabulary has parts for.
    """
    choice, impl = config.parallel.head, config.loss.impl
    part = -(-head.vocabulary // ranks)
    fits = part * (ranks - 1) < head.vocabulary
    if choice == "sharded" and (impl != "auto" or not fits):
        found = f'loss.impl = "{impl}": a sharded head has one implementation'
        if impl == "auto":
            found = f"{ranks} ranks with {part} of {head.vocabulary} tokens each: some have none"
        raise FastsdError(f'parallel.head = "sharded" with {found}; leave parallel.head "auto"')
    if choice != "auto":
        return choice, "parallel.head"
    if impl != "auto" or not fits:
        return "gathered", f'loss.impl = "{impl}"' if impl != "auto" else "too small to be sharded"
    if head.tied:
        return "gathered", "the embedding has the same weights"
    rollout = config.rollout
    rows = rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_new_tokens
    if rows > ranks * LONGEST_ROWS[head.device]:
        return "gathered", f"up to {math.ceil(rows / ranks)} response tokens for each rank"
    gathered, sharded = _bytes_moved(config, head, rows, ranks)
    chosen = "sharded" if sharded < gathered else "gathered"
    return chosen, f"gathered moves {gathered / sharded:.2g} x the bytes of sharded in a step"


def _bytes_moved(config: Config, head: Head, rows: int, ranks: int) -> tuple[int, int]:
    budget = config.optim.micro_batch_tokens
    reduced = 4 if config.parallel.reduce_dtype == "float32" else head.compute_bytes
    batches = math.ceil(rows / (ranks * budget))
    gathered = head.compute_bytes * head.heads + reduced * batches * head.trains
    return head.vocabulary * gathered, rows * (head.compute_bytes * head.streams + 2 * 4)


def sharded_head_loss(
    student_TD: Tensor, target_T: Tensor, policy: Policy, world: World, options: Mapping[str, Any]
) -> LossHeadOutput:
    """`fused_linear_loss` where every rank has a part of the vocabulary: a collective call.

    The losses that the ranks return add up to the loss over all their rows; the gradients of the
    head's part and of student_TD are whole.
    """
    gather = _RowGather(world.rank, world.gather(len(student_TD)))
    given = {**policy.head_options(), **options}
    vectors = {n: x for n, x in given.items() if n.endswith("_T") and x is not None}
    given |= gather.vectors({"target_T": target_T, **vectors})
    if given.get("teacher_TD") is not None:
        given["teacher_TD"] = gather.rows(given["teacher_TD"])
    for name in ("teacher_head_VD", "bias_V"):
        if given.get(name) is not None:
            given[name] = local(given[name]).to(policy.dtype)
    # FSDP gives each rank as many rows, and what is left to the last.
    start = world.rank * -(-len(policy.head_VD) // world.size)
    out = vocabulary_sharded_linear_loss(
        _Gathered.apply(student_TD, gather),
        local(policy.head_VD).to(policy.dtype),
        vocabulary_start=start,
        **given,
    )
    return _own_part(out, gather.own, world.size)


def _own_part(out: LossHeadOutput, own: slice, ranks: int) -> LossHeadOutput:
    """This rank's rows, and as much of the loss as makes the ranks' sum whole."""
    mine = {n: x[own] for n, x in vars(out).items() if n.endswith("_T") and x is not None}
    # The value is divided, the gradient is not.
    return replace(out, loss=out.loss - out.loss.detach() * (1 - 1 / ranks), **mine)


class _RowGather:
    """Collects the rows of all ranks, in the order of ranks. counts: how many each rank has."""

    def __init__(self, rank: int, counts: list[int]):
        self.counts = counts
        start = sum(counts[:rank])
        self.own = slice(start, start + counts[rank])

    def rows(self, rows_TK: Tensor) -> Tensor:
        # Of one size on all ranks: not every backend gathers others.
        padded = rows_TK.new_zeros(max(self.counts), rows_TK.shape[1])
        padded[: len(rows_TK)] = rows_TK
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, self.counts, strict=True)])

    def vectors(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each [T] as [R], in one message; fp64 holds token ids exactly."""
        table_RK = self.rows(torch.stack([x_T.double() for x_T in vectors.values()], 1))
        columns = zip(vectors.items(), table_RK.unbind(1), strict=True)
        return {name: column_R.to(x_T.dtype) for (name, x_T), column_R in columns}


class _Gathered(torch.autograd.Function):
    """student_RD of student_TD. Every rank is given the whole gradient of all rows."""

    @staticmethod
    def forward(ctx, student_TD: Tensor, gather: _RowGather) -> Tensor:
        ctx.own = gather.own
        return gather.rows(student_TD)

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        return upstream[0][ctx.own], None
