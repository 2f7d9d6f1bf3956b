"""From a row's nine sums to its statistics, its loss and the coefficients of its gradient.

One kernel finishes the sums of both plans: the scratch's row kernel (scratch.py) and the tile
that keeps no logits (tile.py). KL(S||T) = U_s/S_s + (shift - (LSE_s - LSE_t)), where U sums
d - shift and the difference of normalisers is formed as one (`log_ratio`), so that equal streams
give exactly 0 and close ones lose little. Policy terms are those of rows.policy_terms.
Shape suffixes: T rows, 9 the sums, E entry sums, C coefficients, R results.
"""

from __future__ import annotations

from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from ..contract import LOG_RATIO_LIMIT, Inputs, Options
from .configs import AotCase, Capability
from .elementary import log_ratio
from .row_kernels import COEFFICIENTS
from .scratch import launch
from .sums import (
    STUDENT_ENERGY,
    STUDENT_GAP,
    STUDENT_MASS,
    STUDENT_MOST,
    STUDENT_TARGET,
    SUMS,
    TEACHER_GAP,
    TEACHER_MASS,
    TEACHER_MOST,
    TEACHER_TARGET,
)

# Rows of results_RT; the last two count, in floats.
RESULTS = (
    "loss_T",
    "student_logprob_T",
    "entropy_T",
    "divergence_T",
    "teacher_logprob_T",
    "policy_clipped_T",
    "entry_clipped_T",
)
_ROWS_PER_PROGRAM = 128
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


def finish_rows(
    sums_T9: Tensor,
    inputs: Inputs,
    options: Options,
    results_RT: Tensor,
    *,
    shift_T: Tensor | None = None,
    entries_TE: Tensor | None = None,
    coefficients_TC: Tensor | None = None,
) -> None:
    """Writes results_RT and, where given, coefficients_TC.

    Args:
        sums_T9: [T, 9] of `row_sums`.
        inputs: the rows' inputs, of which the weights are read.
        results_RT: [7, T] fp32, its rows as in RESULTS; those that do not apply are 0.
        shift_T: what U subtracted; None: z_s[y] - z_t[y], as scratch.row_sums does.
        entries_TE: [T, 5] fp32 value, centre, count of held entries, and the tail's m and slope:
            the divergence where the nine sums do not give it (jsd, entry_clip, top_k).
        coefficients_TC: [T, 13] fp32 for `row_gradients`.
    """
    rows = sums_T9.shape[0]
    weight_T = inputs.divergence_weight_T if inputs.teacher_TD is not None else None
    launch(
        finish_kernel, -(-rows // _ROWS_PER_PROGRAM),
        sums_T9, shift_T, entries_TE, weight_T, inputs.policy_weight_T, inputs.old_logprob_T,
        inputs.entropy_weight_T, results_RT, coefficients_TC,
        rows, results_RT.stride(0), 0.0 if options.clip is None else options.clip,
        DIVERGENCE="none" if inputs.teacher_TD is None else options.divergence,
        SHIFT=shift_T is not None, ENTRIES=entries_TE is not None, WEIGHT=weight_T is not None,
        POLICY=inputs.policy_weight_T is not None, OLD=inputs.old_logprob_T is not None,
        CLIP=options.clip is not None, BONUS=inputs.entropy_weight_T is not None,
        GRADIENT=coefficients_TC is not None, BLOCK=_ROWS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip


@triton.jit
def _policy(logprob, weight, old, clip, OLD: tl.constexpr, CLIP: tl.constexpr):
    """P, dP / dlog p_S(y), and 1 where the PPO clip holds the gradient back."""
    clipped = tl.zeros_like(logprob)
    value = logprob * weight
    pull = -weight
    if OLD:
        # Comparisons with NaN are false, so a NaN stays one.
        change = logprob - old
        bounded = tl.where(change > _LIMIT, _LIMIT, tl.where(change < -_LIMIT, -_LIMIT, change))
        ratio = tl.exp(bounded)
        value = ratio * weight
        pull = tl.where(tl.abs(change) > _LIMIT, 0.0, -value)
        if CLIP:
            low = 1.0 - clip
            high = 1.0 + clip
            limited = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio)) * weight
            held = limited < value
            value = tl.where(held, limited, value)
            pull = tl.where(held, 0.0, pull)
            clipped = tl.where(held, 1.0, 0.0)
    return -value, pull, clipped


@triton.jit
def _divergence(
    sums, s_s, offset, shift, entries, inside, DIVERGENCE: tl.constexpr, ENTRIES: tl.constexpr
):
    """D of each row, its centre and its count of held entries."""
    centre = tl.zeros_like(offset)
    count = tl.zeros_like(offset)
    if ENTRIES:
        value = tl.load(entries, inside, 0.0)
        centre = tl.load(entries + 1, inside, 0.0)
        count = tl.load(entries + 2, inside, 0.0)
    elif DIVERGENCE == "forward_kl":
        s_t = tl.load(sums + TEACHER_MASS, inside, 1.0)
        value = (offset - shift) - tl.load(sums + TEACHER_GAP, inside, 0.0) / s_t
    else:
        value = (shift - offset) + tl.load(sums + STUDENT_GAP, inside, 0.0) / s_s
        centre = value
    return value, centre, count


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    sums_T9, shift_T, entries_TE, divergence_weight, policy_weight, old_logprob, entropy_weight,
    results_RT, coefficients_TC, rows, results_stride, clip,
    DIVERGENCE: tl.constexpr, SHIFT: tl.constexpr, ENTRIES: tl.constexpr, WEIGHT: tl.constexpr,
    POLICY: tl.constexpr, OLD: tl.constexpr, CLIP: tl.constexpr, BONUS: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows: results_RT[:, rows], and coefficients_TC[rows] with GRADIENT."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    sums = sums_T9 + row * SUMS
    m_s = tl.load(sums + STUDENT_MOST, inside, 0.0)
    s_s = tl.load(sums + STUDENT_MASS, inside, 1.0)
    y_s = tl.load(sums + STUDENT_TARGET, inside, 0.0)
    log_s = tl.log(s_s)
    logprob = (y_s - m_s) - log_s
    entropy = log_s - tl.load(sums + STUDENT_ENERGY, inside, 0.0) / s_s
    loss = tl.zeros_like(logprob)
    pull = tl.zeros_like(logprob)
    clipped = tl.zeros_like(logprob)
    count = tl.zeros_like(logprob)
    divergence = tl.zeros_like(logprob)
    teacher = tl.zeros_like(logprob)
    coefficients = coefficients_TC + row * COEFFICIENTS if GRADIENT else row
    if DIVERGENCE != "none":
        m_t = tl.load(sums + TEACHER_MOST, inside, 0.0)
        s_t = tl.load(sums + TEACHER_MASS, inside, 1.0)
        y_t = tl.load(sums + TEACHER_TARGET, inside, 0.0)
        teacher = (y_t - m_t) - tl.log(s_t)
        offset = log_ratio(m_s, s_s, m_t, s_t)
        shift = y_s - y_t
        if DIVERGENCE == "sampled_token":
            divergence = shift - offset
        else:
            entries = row
            if SHIFT:
                shift = tl.load(shift_T + row, inside, 0.0)
            if ENTRIES:
                entries = entries_TE + row * 5
            divergence, centre, count = _divergence(
                sums, s_s, offset, shift, entries, inside, DIVERGENCE, ENTRIES
            )
            if GRADIENT:
                tl.store(coefficients + 3, m_t, inside)
                tl.store(coefficients + 4, 1.0 / s_t, inside)
                tl.store(coefficients + 5, offset, inside)
                tl.store(coefficients + 7, centre, inside)
        if WEIGHT:
            weight = tl.load(divergence_weight + row, inside, 0.0)
            if DIVERGENCE == "sampled_token":
                pull += weight * divergence
                loss += weight * divergence * logprob
            else:
                loss += weight * divergence
                if GRADIENT:
                    tl.store(coefficients + 6, weight, inside)
                    if ENTRIES:
                        tl.store(coefficients + 11, tl.load(entries + 3, inside, 0.0), inside)
                        slope = weight * tl.load(entries + 4, inside, 0.0)
                        tl.store(coefficients + 12, slope, inside)
    if POLICY:
        old = tl.zeros_like(logprob)
        if OLD:
            old = tl.load(old_logprob + row, inside, 0.0)
        weight = tl.load(policy_weight + row, inside, 0.0)
        value, slope, clipped = _policy(logprob, weight, old, clip, OLD, CLIP)
        loss += value
        pull += slope
    if BONUS:
        weight = tl.load(entropy_weight + row, inside, 0.0)
        loss -= weight * entropy
        if GRADIENT:
            tl.store(coefficients + 9, weight, inside)
    if GRADIENT:
        tl.store(coefficients, m_s, inside)
        tl.store(coefficients + 1, 1.0 / s_s, inside)
        tl.store(coefficients + 2, log_s, inside)
        tl.store(coefficients + 8, pull, inside)
        tl.store(coefficients + 10, entropy, inside)
    out = results_RT + row
    tl.store(out, loss, inside)
    tl.store(out + results_stride, logprob, inside)
    tl.store(out + 2 * results_stride, entropy, inside)
    tl.store(out + 3 * results_stride, divergence, inside)
    tl.store(out + 4 * results_stride, teacher, inside)
    tl.store(out + 5 * results_stride, clipped, inside)
    tl.store(out + 6 * results_stride, count, inside)


def aot_cases(capability: Capability) -> list[AotCase]:
    """The kernel with none of its options and with all of them, for each divergence."""
    cases = []
    for divergence, every in product(("none", "forward_kl", "reverse_kl", "sampled_token"), (0, 1)):
        names = ("SHIFT", "WEIGHT", "POLICY", "OLD", "CLIP", "BONUS", "GRADIENT")
        flags = dict.fromkeys(names, bool(every)) | {"DIVERGENCE": divergence, "ENTRIES": False}
        cases.append(_aot_case(flags))
        cases.append(_aot_case(flags | {"ENTRIES": True}))
    return cases


def _aot_case(flags: dict[str, bool | str]) -> AotCase:
    needs = {
        "shift_T": "SHIFT", "entries_TE": "ENTRIES", "divergence_weight": "WEIGHT",
        "policy_weight": "POLICY", "old_logprob": "OLD", "entropy_weight": "BONUS",
        "coefficients_TC": "GRADIENT",
    }  # fmt: skip
    missing = {argument: None for argument, flag in needs.items() if not flags[flag]}
    constants = flags | {"BLOCK": _ROWS_PER_PROGRAM} | missing
    types = {"rows": "i32", "results_stride": "i32", "clip": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in finish_kernel.arg_names}
    divisible = [name for name, kind in signature.items() if kind == "*fp32"] + ["results_stride"]
    shown = " ".join(f"{key}={value}" for key, value in flags.items())
    return AotCase(f"finish {shown}", finish_kernel, signature, constants, tuple(divisible), 4)
