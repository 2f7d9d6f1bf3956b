"""Row kernels of plan A: one program per row of the logits scratch, the vocabulary in blocks.

    row_sums      the nine sums of a row: one read of both streams
    entry_sums    D, its centre and the count of held entries, where they need both normalisers
                  first (jsd, entry_clip): one more read
    gradient      dloss / d(h W^T + b): one read, one write
    target_logits z[y] from hidden states, where there is no scratch

With p = e^(z - m) / S, l = z - m - log S, gap = (z_s - z_t) - (LSE_s - LSE_t), r = log1p(beta
expm1(-gap)), D = sum_j k_j and `held` entries those with k_j > entry_clip, the gradient in the
student's z is

    w_div G  +  w_ent p_s (l_s + H)  +  pull (1[j = y] - p_s),     G and the centre of D:

    forward_kl  k = -p_t gap                                sum of p_t over held
                G = p_s (1 - centre) - p_t                  without the p_t where held
    reverse_kl  k = p_s gap                                 sum of k - sum of p_s over held
                G = p_s (gap - centre)                      gap = -1 where held
    jsd         k = -beta p_t (gap + r) - (1-beta) p_s r    sum of p_s r, r = 0 where held
                G = -(1-beta) p_s (r - centre)
    top_k       the tail's members: e^(z - m_rest) / S_rest of their bucket's gradient; the k
                entries are written afterwards (top_k.py)

Everything is a multiple of the gap or of p_s - p_t: equal streams give exactly 0. That needs
products not to be contracted with sums, so kernels are compiled with enable_fp_fusion=False:
fma(x_s, scale, -z_t) is the rounding error of z_t where x_s = x_t.

Sums run in one lane per column of a block, each with its own maximum: no exchange between threads
until the end of the row, one e^x per entry, an order that depends on the block size alone. So a
row's bits do not depend on the other rows. Program ids are int64 before they meet a stride.
In comments: C = BLOCK columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import LOWEST, expm1, log1p, log_ratio, scaled
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

# Columns of coefficients_TC: m_s, 1/S_s, log S_s, m_t, 1/S_t, LSE_s - LSE_t, w_div, centre, pull,
# w_ent, H, and for top_k m_rest and the tail's slope. finish.py writes those in use.
COEFFICIENTS = tl.constexpr(13)
# Beyond this gap one probability is under e^-80 of the other: its terms vanish.
_LARGEST_GAP = tl.constexpr(80.0)
_MISSING = tl.constexpr(float("-inf"))


@triton.jit
def _logits(
    products, bias, column, inside, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):
    """z at some columns of a row, ABSENT where not inside the vocabulary."""
    x = tl.load(products + column, inside, _MISSING)
    if BIAS:
        x += tl.load(bias + column, inside, 0.0)
    return scaled(x, inner, outer, SOFTCAP)


@triton.jit
def _weigh(z, most):
    """A new entry against a running maximum: e^-|z - m|, -|z - m|, and whether it is above."""
    below = -tl.abs(z - most)
    return tl.exp(below), below, z > most


@triton.jit
def row_sums_kernel(
    student, teacher, bias, target, sums_T9, vocabulary, row_stride, inner, outer,
    TEACHER: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The nine sums of sums.py of one row, with shift = z_s[y] - z_t[y]."""
    row = tl.program_id(0).to(tl.int64)
    student += row * row_stride
    y = tl.load(target + row)
    # An id outside the vocabulary, which a captured graph cannot refuse, reads nothing.
    known = (y >= 0) & (y < vocabulary)
    y_s = _logits(student, bias, y, known, inner, outer, BIAS, SOFTCAP)
    y_t = 0.0
    if TEACHER:
        teacher += row * row_stride
        y_t = _logits(teacher, bias, y, known, inner, outer, BIAS, SOFTCAP)
    m_s = tl.full((BLOCK,), LOWEST, tl.float32)
    m_t = tl.full((BLOCK,), LOWEST, tl.float32)
    s_s = tl.zeros((BLOCK,), tl.float32)
    s_t = tl.zeros((BLOCK,), tl.float32)
    u_s = tl.zeros((BLOCK,), tl.float32)
    u_t = tl.zeros((BLOCK,), tl.float32)
    e_s = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)  # [C]
        inside = column < vocabulary
        z_s = _logits(student, bias, column, inside, inner, outer, BIAS, SOFTCAP)
        e, below, above = _weigh(z_s, m_s)
        old, new = tl.where(above, e, 1.0), tl.where(above, 1.0, e)
        e_s = tl.where(above, (e_s + s_s * below) * e, e_s + e * below)
        s_s = s_s * old + new
        m_s = tl.where(above, z_s, m_s)
        if TEACHER:
            z_t = _logits(teacher, bias, column, inside, inner, outer, BIAS, SOFTCAP)
            gap = (z_s - z_t) - (y_s - y_t)
            u_s = u_s * old + new * gap
            e, below, above = _weigh(z_t, m_t)
            old, new = tl.where(above, e, 1.0), tl.where(above, 1.0, e)
            s_t = s_t * old + new
            u_t = u_t * old + new * gap
            m_t = tl.where(above, z_t, m_t)
    sums_T9 += row * SUMS
    most = tl.max(m_s, 0)
    scale = tl.exp(m_s - most)
    tl.store(sums_T9 + STUDENT_MOST, most)
    tl.store(sums_T9 + STUDENT_MASS, tl.sum(s_s * scale, 0))
    tl.store(sums_T9 + STUDENT_GAP, tl.sum(u_s * scale, 0))
    tl.store(sums_T9 + STUDENT_ENERGY, tl.sum((e_s + s_s * (m_s - most)) * scale, 0))
    most = tl.max(m_t, 0)
    scale = tl.exp(m_t - most)
    tl.store(sums_T9 + TEACHER_MOST, most)
    tl.store(sums_T9 + TEACHER_MASS, tl.sum(s_t * scale, 0))
    tl.store(sums_T9 + TEACHER_GAP, tl.sum(u_t * scale, 0))
    tl.store(sums_T9 + STUDENT_TARGET, y_s)
    tl.store(sums_T9 + TEACHER_TARGET, y_t)


@triton.jit
def _jsd_entry(p_s, p_t, gap, beta):
    """k and r. gap + r is log1p((1-beta) expm1(gap)); the smaller weight's is the exact one."""
    gap = tl.where(
        gap < -_LARGEST_GAP, -_LARGEST_GAP, tl.where(gap > _LARGEST_GAP, _LARGEST_GAP, gap)
    )
    low = beta <= 0.5
    log = log1p(tl.where(low, beta, 1.0 - beta) * expm1(tl.where(low, -gap, gap)))
    r = tl.where(low, log, log - gap)
    return -beta * p_t * tl.where(low, gap + log, log) - (1.0 - beta) * p_s * r, r


@triton.jit
def entry_sums_kernel(
    student, teacher, bias, sums_T9, entries_TE, vocabulary, row_stride, inner, outer, clip, beta,
    DIVERGENCE: tl.constexpr, CLIP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sum of min(k, clip), the centre, and how many entries are held, of one row."""
    row = tl.program_id(0).to(tl.int64)
    student += row * row_stride
    teacher += row * row_stride
    sums_T9 += row * SUMS
    m_s, s_s = tl.load(sums_T9 + STUDENT_MOST), tl.load(sums_T9 + STUDENT_MASS)
    m_t, s_t = tl.load(sums_T9 + TEACHER_MOST), tl.load(sums_T9 + TEACHER_MASS)
    offset = log_ratio(m_s, s_s, m_t, s_t)
    value = tl.zeros((BLOCK,), tl.float32)
    centre = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)  # [C]
        inside = column < vocabulary
        z_s = _logits(student, bias, column, inside, inner, outer, BIAS, SOFTCAP)
        z_t = _logits(teacher, bias, column, inside, inner, outer, BIAS, SOFTCAP)
        p_s = tl.exp(z_s - m_s) / s_s
        p_t = tl.exp(z_t - m_t) / s_t
        gap = (z_s - z_t) - offset
        if DIVERGENCE == "forward_kl":
            entry = -p_t * gap
            free, bound = tl.zeros_like(p_t), p_t
        elif DIVERGENCE == "reverse_kl":
            entry = p_s * gap
            free, bound = entry, -p_s
        else:
            entry, r = _jsd_entry(p_s, p_t, gap, beta)
            free, bound = p_s * r, tl.zeros_like(p_s)
        if CLIP:
            held = entry > clip
            entry = tl.where(held, clip, entry)
            free = tl.where(held, bound, free)
            count += tl.where(held, 1.0, 0.0)
        value += entry
        centre += free
    entries_TE += row * 5
    tl.store(entries_TE, tl.sum(value, 0))
    tl.store(entries_TE + 1, tl.sum(centre, 0))
    tl.store(entries_TE + 2, tl.sum(count, 0))
    tl.store(entries_TE + 3, 0.0)
    tl.store(entries_TE + 4, 0.0)


@triton.jit
def _divergence_gradient(
    p_s, z_s, z_t, m_t, unit_t, offset, centre, clip, beta,
    DIVERGENCE: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """G of the module's docstring, for a block of one row."""
    gap = (z_s - z_t) - offset
    if DIVERGENCE == "reverse_kl":
        if CLIP:
            gap = tl.where(p_s * gap > clip, -1.0, gap)
        return p_s * (gap - centre)
    else:
        p_t = tl.exp(z_t - m_t) * unit_t
        if DIVERGENCE == "forward_kl":
            kept = p_t
            if CLIP:
                kept = tl.where(-p_t * gap > clip, 0.0, p_t)
                p_s = p_s * (1.0 - centre)
            return p_s - kept
        else:
            entry, r = _jsd_entry(p_s, p_t, gap, beta)
            if CLIP:
                r = tl.where(entry > clip, 0.0, r)
            return p_s * (r - centre) * (beta - 1.0)


@triton.jit
def gradient_kernel(
    student, teacher, bias, target, coefficients, gradient, vocabulary, row_stride,
    gradient_stride, inner, outer, slope, clip, beta,
    DIVERGENCE: tl.constexpr, CLIP: tl.constexpr, PULL: tl.constexpr, ENTROPY: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss / d(h W^T + b) of one row. `gradient` may be `student`: entries map one to one."""
    row = tl.program_id(0).to(tl.int64)
    student += row * row_stride
    gradient += row * gradient_stride
    coefficients += row * COEFFICIENTS
    m_s, unit_s = tl.load(coefficients), tl.load(coefficients + 1)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)  # [C]
        inside = column < vocabulary
        z_s = _logits(student, bias, column, inside, inner, outer, BIAS, SOFTCAP)
        p_s = tl.exp(z_s - m_s) * unit_s
        g = tl.zeros_like(p_s)
        if DIVERGENCE == "top_k":
            g = tl.exp(z_s - tl.load(coefficients + 11)) * tl.load(coefficients + 12)
        elif DIVERGENCE != "none":
            z_t = _logits(
                teacher + row * row_stride, bias, column, inside, inner, outer, BIAS, SOFTCAP
            )
            g = _divergence_gradient(
                p_s, z_s, z_t, tl.load(coefficients + 3), tl.load(coefficients + 4),
                tl.load(coefficients + 5), tl.load(coefficients + 7), clip, beta, DIVERGENCE, CLIP,
            )  # fmt: skip
            g = g * tl.load(coefficients + 6)
        if ENTROPY:
            l_s = (z_s - m_s) - tl.load(coefficients + 2)
            g += p_s * ((l_s + tl.load(coefficients + 10)) * tl.load(coefficients + 9))
        if PULL:
            pull = tl.load(coefficients + 8)
            g += tl.where(column == tl.load(target + row), pull, 0.0) - pull * p_s
        if SOFTCAP:
            capped = z_s / outer
            g = g * (1.0 - capped * capped)
        tl.store(gradient + column, (g * slope).to(gradient.dtype.element_ty), inside)


@triton.jit
def target_logits_kernel(
    hidden, head, bias, target, logits_T, vocabulary, width, hidden_stride, head_stride, inner,
    outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z[y] of one row from its hidden state and its target's row of the head."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    known = (y >= 0) & (y < vocabulary)
    hidden += row * hidden_stride
    head += tl.where(known, y, 0) * head_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        h = tl.load(hidden + column, inside, 0.0).to(tl.float32)
        total += h * tl.load(head + column, inside, 0.0).to(tl.float32)
    x = tl.sum(total, 0)
    if BIAS:
        x += tl.load(bias + y, known, 0.0)
    tl.store(logits_T + row, scaled(x, inner, outer, SOFTCAP))
