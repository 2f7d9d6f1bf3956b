"""Checks of the loss head's arguments: each error names the argument, the finding, the remedy."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..autocast import autocast_dtype
from .contract import Inputs, Options

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "sampled_token")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_options(head_VD: Tensor, options: Options) -> Options:
    """The options with the limits made explicit: jsd's beta 0 and 1, and top_k = V.

    Raises ValueError or TypeError naming the option.
    """
    if options.divergence not in _DIVERGENCES:
        choices = ", ".join(_DIVERGENCES)
        raise ValueError(f"divergence: expected one of {choices}, got {options.divergence!r}")
    for name in ("temperature", "logit_scale", "softcap", "entry_clip", "clip"):
        value = getattr(options, name)
        if value is None and name in ("softcap", "entry_clip", "clip"):
            continue
        if not 0 < _number(name, value) < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    if options.divergence == "jsd":
        if not 0 <= _number("beta", options.beta) <= 1:
            raise ValueError(f"beta: expected 0 <= beta <= 1 for jsd, got {options.beta}")
        limits = {0.0: "forward_kl", 1.0: "reverse_kl"}
        options = replace(options, divergence=limits.get(float(options.beta), "jsd"))
    if options.divergence == "sampled_token":
        for name in ("top_k", "entry_clip"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{name}: sampled_token looks at one token only; leave {name} out or choose "
                    "forward_kl, reverse_kl or jsd"
                )
    return _check_top_k(options, head_VD)


def _check_top_k(options: Options, head_VD: Tensor) -> Options:
    if options.top_k is None:
        return options
    if isinstance(options.top_k, bool) or not isinstance(options.top_k, int):
        raise TypeError(f"top_k: expected an int or None, got {type(options.top_k).__name__}")
    _matrix("head_VD", head_VD)
    vocabulary = head_VD.shape[0]
    if not 1 <= options.top_k <= vocabulary:
        raise ValueError(f"top_k: expected 1 <= top_k <= V = {vocabulary}, got {options.top_k}")
    return replace(options, top_k=None) if options.top_k == vocabulary else options


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return value


def check_inputs(inputs: Inputs, mask_T: Tensor | None = None) -> None:
    """Types, shapes, dtypes and devices; looks at no element."""
    student, head = inputs.student_TD, inputs.head_VD
    _matrix("student_TD", student)
    _matrix("head_VD", head)
    rows, width = student.shape
    _shape("head_VD", head, (None, width), "[V, D] with student_TD's D")
    if head.shape[0] == 0:
        raise ValueError("head_VD: expected at least one vocabulary entry, got shape [0, D]")
    if inputs.teacher_head_VD is not None and inputs.teacher_TD is None:
        raise ValueError("teacher_head_VD: given without teacher_TD; pass teacher_TD or leave out")
    if inputs.teacher_TD is not None:
        _matrix("teacher_TD", inputs.teacher_TD)
        width_t = width
        if inputs.teacher_head_VD is not None:
            _matrix("teacher_head_VD", inputs.teacher_head_VD)
            width_t = inputs.teacher_head_VD.shape[1]
            expected = (head.shape[0], width_t)
            _shape("teacher_head_VD", inputs.teacher_head_VD, expected, "[V, D'] with head_VD's V")
        _shape("teacher_TD", inputs.teacher_TD, (rows, width_t), "[T, D of the teacher's head]")
    if inputs.bias_V is not None:
        _floating("bias_V", inputs.bias_V)
        _shape("bias_V", inputs.bias_V, (head.shape[0],), "[V]")
    _check_row_vectors(inputs, mask_T, rows)
    _check_placement(inputs, mask_T)


def _check_row_vectors(inputs: Inputs, mask_T: Tensor | None, rows: int) -> None:
    _tensor("target_T", inputs.target_T)
    if inputs.target_T.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target_T: expected int64 or int32, got {_name(inputs.target_T.dtype)}")
    vectors = {name: value for name, value in vars(inputs).items() if name.endswith("_T")}
    for name, value in {**vectors, "mask_T": mask_T}.items():
        if value is None:
            continue
        _tensor(name, value)
        _shape(name, value, (rows,), "[T] like student_TD")
        if value.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {_name(value.dtype)}")


def _check_placement(inputs: Inputs, mask_T: Tensor | None) -> None:
    student = inputs.student_TD
    autocast = autocast_dtype(student.device) is not None
    for name, value in {**vars(inputs), "mask_T": mask_T}.items():
        if value is None:
            continue
        if value.device != student.device:
            raise ValueError(
                f"{name}: expected device {student.device} like student_TD, got {value.device}"
            )
        matrix = name.endswith(("_TD", "_VD"))
        if matrix and value.dtype != student.dtype and not autocast:
            raise TypeError(
                f"{name}: expected {_name(student.dtype)} like student_TD, got "
                f"{_name(value.dtype)}; cast one of them or run under torch.autocast"
            )


def check_terms(inputs: Inputs, options: Options) -> None:
    """Options that need a tensor which is not there, or a loss of no terms; no element read."""
    if inputs.teacher_TD is None:
        given = {
            "divergence_weight_T": inputs.divergence_weight_T,
            "top_k": options.top_k,
            "entry_clip": options.entry_clip,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: given without teacher_TD; pass teacher_TD or leave out")
        if inputs.policy_weight_T is None and inputs.entropy_weight_T is None:
            raise ValueError(
                "the loss has no terms: pass teacher_TD, policy_weight_T or entropy_weight_T"
            )
    if inputs.policy_weight_T is None:
        for name, value in (("old_logprob_T", inputs.old_logprob_T), ("clip", options.clip)):
            if value is not None:
                raise ValueError(f"{name}: given without policy_weight_T; pass it or leave out")
    elif options.clip is not None and inputs.old_logprob_T is None:
        raise ValueError(
            "clip: given without old_logprob_T; the ratio p_S / p_old that it clips needs it"
        )


def check_weights(inputs: Inputs) -> None:
    """Weights are finite on every row."""
    for name in ("divergence_weight_T", "policy_weight_T", "entropy_weight_T"):
        _finite(name, getattr(inputs, name), None)


def check_rows(inputs: Inputs, rows_T: Tensor | None) -> None:
    """Values on the rows that count; rows_T are their indices (None: all of them)."""
    vocabulary = inputs.head_VD.shape[0]
    target_T = inputs.target_T
    wrong_T = (target_T < 0) | (target_T >= vocabulary)
    if wrong_T.any():
        row = int(wrong_T.nonzero()[0, 0])
        raise ValueError(
            f"target_T: expected 0 <= id < V = {vocabulary} on rows that count, got "
            f"{int(target_T[row])} at row {row if rows_T is None else int(rows_T[row])}; give rows "
            "that do not count weight 0"
        )
    _finite("old_logprob_T", inputs.old_logprob_T, rows_T)


def _finite(name: str, value: Tensor | None, rows_T: Tensor | None) -> None:
    if value is None or not value.is_floating_point():
        return
    finite_T = value.isfinite()
    if not finite_T.all():
        row = int((~finite_T).nonzero()[0, 0])
        where = row if rows_T is None else int(rows_T[row])
        raise ValueError(f"{name}: expected finite numbers, got {float(value[row])} at row {where}")


def _tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _floating(name: str, value) -> None:
    _tensor(name, value)
    if value.dtype not in _FLOATS:
        choices = ", ".join(_name(d) for d in _FLOATS)
        raise TypeError(f"{name}: expected one of {choices}, got {_name(value.dtype)}")


def _matrix(name: str, value) -> None:
    _floating(name, value)
    if value.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {list(value.shape)}")


def _shape(name: str, value: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    found = tuple(value.shape)
    matches = len(found) == len(expected) and all(
        e is None or e == f for e, f in zip(expected, found, strict=True)
    )
    if not matches:
        wanted = ", ".join("V" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected [{wanted}] ({meaning}), got {list(found)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
