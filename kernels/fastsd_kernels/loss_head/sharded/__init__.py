"""The loss head with its rows split over the ranks of a process group: the public functions.

Each rank holds all T rows of both streams, the same on every rank, and its part of the head's V
rows (tensor parallelism). No rank starts before all have agreed on the call (agreement.py), so
ranks that differ all raise instead of hanging. evaluation.py works through the rows; rows.py,
softmax.py and top_k.py have the mathematics of a shard, ranks.py the messages.
Shape suffixes: T rows (tokens), D hidden size, V vocabulary entries of this rank's shard.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...autocast import autocast_dtype
from ..compaction import Rows
from ..contract import Evaluation, Inputs, LossHeadOutput, LossHeadStatistics, Options
from .agreement import agree_on_loss, agree_on_statistics
from .evaluation import evaluate_shard


def vocabulary_sharded_linear_loss(
    student_TD: Tensor,
    head_shard_VD: Tensor,
    target_T: Tensor,
    *,
    vocabulary_start: int,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_gradient: bool = True,
    teacher_TD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    divergence_weight_T: Tensor | None = None,
    policy_weight_T: Tensor | None = None,
    old_logprob_T: Tensor | None = None,
    clip: float | None = Options.clip,
    entropy_weight_T: Tensor | None = None,
    divergence: str = Options.divergence,
    beta: float = Options.beta,
    temperature: float = Options.temperature,
    logit_scale: float = Options.logit_scale,
    softcap: float | None = Options.softcap,
    top_k: int | None = Options.top_k,
    tail: bool = Options.tail,
    entry_clip: float | None = Options.entry_clip,
) -> LossHeadOutput:
    """`fused_linear_loss` with the head's rows split over the ranks of a process group.

    A collective call: every rank of the group makes it, with the same rows, weights and options.

    Args:
        student_TD, target_T, teacher_TD and the row weights: all T rows, equal on every rank;
            target_T holds ids of the whole vocabulary.
        head_shard_VD: [V, D] this rank's rows of the head, without padding rows: each row counts
            as a vocabulary entry. Shards may differ in size and tile the vocabulary.
        vocabulary_start: the id of head_shard_VD's first row.
        group: the process group; None is the default group, or this process alone where
            torch.distributed is not initialised.
        reduce_hidden_gradient: True: the gradient of student_TD is the whole one on every rank,
            summed here in fp32. This is the tensor-parallel convention for a replicated input; a
            layer before it that sums gradients over the group (Megatron's "copy to the
            tensor-parallel region") must be left out, or would sum twice. False: this shard's part
            only, for callers that sum or reduce-scatter it themselves (sequence parallelism).
        teacher_head_VD, bias_V: this rank's rows of each.
        The rest: as `fused_linear_loss`; top_k selects among the whole vocabulary.

    The gradients are formed in the forward pass; the backward pass only scales them, sends nothing
    and expects the same upstream gradient on every rank. Looks at values, so a GPU is synchronised
    a few times a call; not for CUDA graphs or inside torch.compile.

    Returns: LossHeadOutput, impl "sharded"; loss and statistics are the same bits on every rank.

    Raises: ValueError or TypeError as `fused_linear_loss`; ValueError on every rank where ranks
        differ in what must be equal, the shards do not tile the vocabulary, or another rank
        refused its call.
    """
    options = Options(
        divergence, beta, temperature, logit_scale, softcap, top_k, tail, entry_clip, clip
    )
    inputs = _autocast(Inputs(
        student_TD, head_shard_VD, target_T, bias_V, teacher_TD, teacher_head_VD,
        divergence_weight_T, policy_weight_T, old_logprob_T, entropy_weight_T,
    ))  # fmt: skip
    wanted = tuple(inputs.wanted())
    with torch.no_grad():
        call = agree_on_loss(
            inputs, options, vocabulary_start, group, wanted, bool(reduce_hidden_gradient)
        )
        found = evaluate_shard(call, wanted, bool(reduce_hidden_gradient))
    loss = _ScaleGradients.apply(*inputs.leaves, found, call.rows)
    return LossHeadOutput(loss=loss, impl="sharded", **_all_rows(found, call.rows))


def vocabulary_sharded_linear_statistics(
    student_TD: Tensor,
    head_shard_VD: Tensor,
    target_T: Tensor,
    *,
    vocabulary_start: int,
    group: dist.ProcessGroup | None = None,
    teacher_TD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    mask_T: Tensor | None = None,
    divergence: str = Options.divergence,
    beta: float = Options.beta,
    temperature: float = Options.temperature,
    logit_scale: float = Options.logit_scale,
    softcap: float | None = Options.softcap,
    top_k: int | None = Options.top_k,
    tail: bool = Options.tail,
    entry_clip: float | None = Options.entry_clip,
) -> LossHeadStatistics:
    """The detached statistics of `vocabulary_sharded_linear_loss`, at its two forward GEMMs.

    Args as there; mask_T: [T] bool or numbers, rows where it is zero are dropped and report 0.
    Returns: LossHeadStatistics, the same bits on every rank.
    Raises: as `vocabulary_sharded_linear_loss`.
    """
    options = Options(divergence, beta, temperature, logit_scale, softcap, top_k, tail, entry_clip)
    inputs = Inputs(student_TD, head_shard_VD, target_T, bias_V, teacher_TD, teacher_head_VD)
    with torch.no_grad():
        inputs = _autocast(inputs)
        call = agree_on_statistics(inputs, mask_T, options, vocabulary_start, group)
        found = evaluate_shard(call, (False, False, False), False)
    return LossHeadStatistics(impl="sharded", **_all_rows(found, call.rows))


class _ScaleGradients(torch.autograd.Function):
    """Hands out gradients that are already there, times the upstream gradient."""

    @staticmethod
    def forward(ctx, student_TD, head_VD, bias_V, found: Evaluation, rows: Rows):
        d_student_TD, *others = found.gradients
        ctx.save_for_backward(_at_all_rows(d_student_TD, rows), *others)
        return found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # On CPU the usual 1.0 saves a pass over [V, D]; on a GPU looking at it would be a sync.
        unscaled = upstream.device.type == "cpu" and upstream.item() == 1.0
        saved = (x if x is None or unscaled else x * upstream for x in ctx.saved_tensors)
        return *saved, None, None


def _autocast(inputs: Inputs) -> Inputs:
    """Matrices in the autocast dtype, if there is one; differentiable."""
    if not isinstance(inputs.student_TD, Tensor):
        return inputs
    dtype = autocast_dtype(inputs.student_TD.device)
    if dtype is None:
        return inputs
    matrices = {
        name: x.to(dtype)
        for name, x in vars(inputs).items()
        if name.endswith(("_TD", "_VD")) and isinstance(x, Tensor)
    }
    return replace(inputs, **matrices)


def _all_rows(found: Evaluation, rows: Rows) -> dict[str, Any]:
    return {name: _at_all_rows(x, rows) for name, x in vars(found.statistics).items()}


def _at_all_rows(value: Tensor | None, rows: Rows) -> Tensor | None:
    return None if value is None else rows.spread(value)
