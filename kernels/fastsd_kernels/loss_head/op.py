"""The loss head as two PyTorch operators, `fastsd_kernels::linear_loss` and `::linear_statistics`.

Their arguments are the tensors, numbers and strings of the public functions, in the order of the
fields of `Inputs` and `Options`. Everything that depends on values happens inside: checks of
weights and targets, dropping of rows that do not count, the choice of implementation. So a
compiled graph holds one node per call whatever the data, and what is traced are shapes.

`linear_loss` returns the gradients next to the loss, and its backward scales them. Autograd keeps
them and nothing else: no hidden states, no [T, V]. Outputs that a call does not have are empty.

While a CUDA graph is captured no value may reach the host, so values go unchecked.
Shape suffixes: T rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .compaction import Rows, capturing, keep_rows
from .contract import Inputs, Options, RowStatistics
from .dispatch import implementation
from .validation import check_inputs, check_options, check_rows, check_terms, check_weights

STATISTICS = (
    "student_logprob_T",
    "entropy_T",
    "divergence_T",
    "teacher_logprob_T",
    "policy_clipped_T",
    "entry_clipped_T",
)

_TENSORS = (
    "Tensor student_TD, Tensor head_VD, Tensor target_T, Tensor? bias_V, Tensor? teacher_TD, "
    "Tensor? teacher_head_VD"
)
_WEIGHTS = (
    "Tensor? divergence_weight_T, Tensor? policy_weight_T, Tensor? old_logprob_T, "
    "Tensor? entropy_weight_T"
)
_OPTIONS = (
    "str divergence, float beta, float temperature, float logit_scale, float? softcap, "
    "int? top_k, bool tail, float? entry_clip"
)
_ROWS = ", ".join(["Tensor"] * len(STATISTICS))
_LOSS = (
    f"({_TENSORS}, {_WEIGHTS}, {_OPTIONS}, float? clip, str impl, bool[] wanted) -> "
    f"(Tensor, Tensor, Tensor, Tensor, {_ROWS})"
)
_STATISTICS = f"({_TENSORS}, Tensor? mask_T, {_OPTIONS}, str impl) -> ({_ROWS})"

Wanted = tuple[bool, bool, bool]


def run_loss(*args: Any) -> tuple[Tensor, ...]:
    """(loss, d student_TD, d head_VD, d bias_V, *STATISTICS); `wanted` names the gradients."""
    with _autocast_off(args[0].device):
        inputs, options, impl, wanted = _loss_call(args)
        if not capturing(inputs.student_TD.device):
            check_weights(inputs)
        given = (inputs.divergence_weight_T, inputs.policy_weight_T, inputs.entropy_weight_T)
        weights = [w != 0 for w in given if w is not None]
        everywhere = inputs.teacher_TD is not None and inputs.divergence_weight_T is None
        rows = _rows(inputs, None if everywhere else torch.stack(weights).any(0))
        if rows.inputs.student_TD.shape[0] == 0:
            return tuple(x.zero_() for x in _empty_loss(inputs, options, wanted))
        if everywhere:
            ones_T = torch.ones_like(rows.inputs.target_T, dtype=inputs.statistics_dtype)
            rows = replace(rows, inputs=replace(rows.inputs, divergence_weight_T=ones_T))
        found = _module(impl, inputs).evaluate(rows.inputs, options, wanted)
        d_student_TD, *others = found.gradients
        gradients = (None if d_student_TD is None else rows.spread(d_student_TD), *others)
        return (
            found.loss,
            *(_absent(inputs) if g is None else g.contiguous() for g in gradients),
            *_all_rows(found.statistics, rows, inputs, options),
        )


linear_loss = torch.library.custom_op(
    "fastsd_kernels::linear_loss", run_loss, mutates_args=(), schema=_LOSS
)


@linear_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, options, _, wanted = _loss_call(args)
    return _empty_loss(inputs, options, wanted)


def _loss_call(args: tuple) -> tuple[Inputs, Options, str, Wanted]:
    *flat, impl, wanted = args
    inputs = Inputs(*flat[:10])
    options = check_options(inputs.head_VD, Options(*flat[10:]))
    check_inputs(inputs)
    check_terms(inputs, options)
    if len(wanted) != 3 or (wanted[2] and inputs.bias_V is None):
        raise ValueError(
            f"wanted: expected three bools for (student_TD, head_VD, bias_V), the last false "
            f"without bias_V; got {wanted}"
        )
    return inputs, options, impl, tuple(wanted)


def _empty_loss(inputs: Inputs, options: Options, wanted: Wanted) -> tuple[Tensor, ...]:
    return (
        inputs.student_TD.new_empty((), dtype=inputs.statistics_dtype),
        *(
            x.new_empty(x.shape) if want and x is not None else _absent(inputs)
            for x, want in zip(inputs.leaves, wanted, strict=True)
        ),
        *_empty_statistics(inputs, options),
    )


def _keep_gradients(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:4])
    ctx.arguments, ctx.wanted = len(inputs), inputs[-1]


def _scale_gradients(ctx, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused_linear_loss is differentiable once and was asked for a gradient with "
            "create_graph=True; leave create_graph out"
        )
    if upstream is None:
        return (None,) * ctx.arguments
    # On CPU the usual 1.0 saves a pass over [V, D]; on a GPU looking at it would be a sync.
    plain = type(upstream) is Tensor and upstream.device.type == "cpu"
    unscaled = plain and upstream.item() == 1.0
    d_student_TD, d_head_VD, d_bias_V = (
        None if not want else gradient if unscaled else gradient * upstream
        for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return d_student_TD, d_head_VD, None, d_bias_V, *[None] * (ctx.arguments - 4)


linear_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def run_statistics(*args: Any) -> tuple[Tensor, ...]:
    """STATISTICS of the rows where mask_T is not zero."""
    with _autocast_off(args[0].device):
        inputs, mask_T, options, impl = _statistics_call(args)
        rows = _rows(inputs, None if mask_T is None else mask_T != 0)
        if rows.inputs.student_TD.shape[0] == 0:
            return tuple(x.zero_() for x in _empty_statistics(inputs, options))
        found = _module(impl, inputs).statistics(rows.inputs, options)
        return _all_rows(found, rows, inputs, options)


linear_statistics = torch.library.custom_op(
    "fastsd_kernels::linear_statistics", run_statistics, mutates_args=(), schema=_STATISTICS
)


@linear_statistics.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, _, options, _ = _statistics_call(args)
    return _empty_statistics(inputs, options)


def _statistics_call(args: tuple) -> tuple[Inputs, Tensor | None, Options, str]:
    *flat, impl = args
    inputs, mask_T = Inputs(*flat[:6]), flat[6]
    options = check_options(inputs.head_VD, Options(*flat[7:]))
    check_inputs(inputs, mask_T)
    return inputs, mask_T, options, impl


def _constants(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx, *_: Tensor | None):
    raise RuntimeError("linear_statistics has no gradient: its results are constants")


linear_statistics.register_autograd(_no_gradient, setup_context=_constants)


def has_statistic(name: str, inputs: Inputs, options: Options) -> bool:
    """Whether a call with these arguments reports the statistic."""
    teacher = inputs.teacher_TD is not None
    sometimes = {
        "divergence_T": teacher,
        "teacher_logprob_T": teacher,
        "policy_clipped_T": options.clip is not None,
        "entry_clipped_T": teacher and options.entry_clip is not None,
    }
    return sometimes.get(name, True)


def _empty_statistics(inputs: Inputs, options: Options) -> tuple[Tensor, ...]:
    types = {"policy_clipped_T": torch.bool, "entry_clipped_T": torch.int64}
    like_TD, wide = inputs.student_TD, inputs.statistics_dtype
    return tuple(
        like_TD.new_empty(like_TD.shape[0], dtype=types.get(name, wide))
        if has_statistic(name, inputs, options)
        else _absent(inputs)
        for name in STATISTICS
    )


def _all_rows(
    found: RowStatistics, rows: Rows, inputs: Inputs, options: Options
) -> tuple[Tensor, ...]:
    return tuple(
        rows.spread(getattr(found, name))
        if has_statistic(name, inputs, options)
        else _absent(inputs)
        for name in STATISTICS
    )


def _absent(inputs: Inputs) -> Tensor:
    return inputs.student_TD.new_empty(0)


def _rows(inputs: Inputs, counts_T: Tensor | None) -> Rows:
    """The rows that count, as constants of the types that an implementation is promised."""
    own, wide = inputs.teacher_head_VD, inputs.statistics_dtype
    if own is not None and own.is_set_to(inputs.head_VD):
        inputs = replace(inputs, teacher_head_VD=None)  # the same memory: widened and read once
    values = {name: None if x is None else x.detach() for name, x in vars(inputs).items()}
    for name, value in values.items():
        if value is not None and name.endswith("_T"):
            values[name] = value.to(torch.int64 if name == "target_T" else wide)
    drop = not capturing(inputs.student_TD.device)
    rows = keep_rows(Inputs(**values), counts_T, drop)  # type: ignore[arg-type]
    if drop:
        check_rows(rows.inputs, rows.index_T)
    return rows


def _module(impl: str, inputs: Inputs):
    return implementation(impl, inputs.student_TD.device, inputs.student_TD.dtype)


def _autocast_off(device: torch.device) -> AbstractContextManager:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
