"""The kernels of `tile.py`: the two-stream tile, and the merge of its vocabulary splits.

Running sums of a row over columns seen so far, rescaled when its maximum grows:

    m = max z,  S = sum e^(z - m),  U = sum e^(z - m) (d - shift)        of either stream
    E = sum e^(z_s - m_s) z_s,  z_s[y],  z_t[y]                          d = z_s - z_t

A tile of products is folded into them in PIECES halves of halves. Its accumulators already take
half of the registers: folded whole, 128 x 128 of both streams spills, in halves it does not.
Tile shapes in comments: R = BLOCK_T rows, C = BLOCK_V columns (of a piece: fewer), K = BLOCK_D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import LOWEST, tanh
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


@triton.jit
def _load_tile(
    matrix, first_row, first_column, rows, columns, stride,
    TMA: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_ROWS, BLOCK_COLUMNS] of a row-major matrix, zero outside."""
    if TMA:
        return matrix.load([first_row, first_column])
    else:
        row = first_row + tl.arange(0, BLOCK_ROWS)
        column = first_column + tl.arange(0, BLOCK_COLUMNS)
        offset = row.to(tl.int64)[:, None] * stride + column[None, :]
        return tl.load(matrix + offset, (row < rows)[:, None] & (column < columns)[None, :], 0.0)


@triton.jit
def _dot(left, right, total, UPCAST: tl.constexpr):
    """total + left right^T. The interpreter multiplies bf16 wrongly: exact in fp32 there."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right.T, total, input_precision="ieee")


@triton.jit
def _scaled(product, bias, inside, inner, outer, SOFTCAP: tl.constexpr):
    """z of a [R, C] product; columns outside the vocabulary weigh nothing."""
    z = (product + bias[None, :]) * inner
    if SOFTCAP:
        z = tanh(z) * outer
    return tl.where(inside[None, :], z, LOWEST)


@triton.jit
def _weigh(z, gap, maximum, mass, weighted):
    """Maximum, S and U with one more [R, C] piece; e^(old m - new m), and e^(z - m) there."""
    highest = tl.maximum(maximum, tl.max(z, 1))
    keep = tl.exp(maximum - highest)
    e = tl.exp(z - highest[:, None])
    mass = mass * keep + tl.sum(e, 1)
    weighted = weighted * keep + tl.sum(e * gap, 1)
    return highest, mass, weighted, keep, e


@triton.jit
def _fold(
    sums, x_s, x_t, first_column, y, offset, bias, V, inner, outer,
    HAS_TEACHER: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The nine sums with one more [R, C] tile of products, in PIECES to need fewer registers."""
    WIDTH: tl.constexpr = x_s.shape[1]
    if PIECES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left_s, right_s = tl.split(x_s.reshape(x_s.shape[0], 2, HALF).trans(0, 2, 1))
        left_t, right_t = tl.split(x_t.reshape(x_t.shape[0], 2, HALF).trans(0, 2, 1))
        sums = _fold(
            sums, left_s, left_t, first_column, y, offset, bias, V, inner, outer,
            HAS_TEACHER, HAS_BIAS, SOFTCAP, PIECES // 2,
        )  # fmt: skip
        return _fold(
            sums, right_s, right_t, first_column + HALF, y, offset, bias, V, inner, outer,
            HAS_TEACHER, HAS_BIAS, SOFTCAP, PIECES // 2,
        )  # fmt: skip
    else:
        m_s, s_s, u_s, e_s, m_t, s_t, u_t, y_s, y_t = sums
        column = first_column + tl.arange(0, WIDTH)
        inside = column < V
        hit = column[None, :] == y[:, None]
        b = tl.zeros((WIDTH,), tl.float32)
        if HAS_BIAS:
            b = tl.load(bias + column, inside, 0.0).to(tl.float32)
        z_s = _scaled(x_s, b, inside, inner, outer, SOFTCAP)
        y_s += tl.sum(tl.where(hit, z_s, 0.0), 1)
        gap = tl.zeros_like(z_s)
        if HAS_TEACHER:
            z_t = _scaled(x_t, b, inside, inner, outer, SOFTCAP)
            y_t += tl.sum(tl.where(hit, z_t, 0.0), 1)
            gap = z_s - z_t - offset[:, None]
            m_t, s_t, u_t, keep, e = _weigh(z_t, gap, m_t, s_t, u_t)
        m_s, s_s, u_s, keep, e = _weigh(z_s, gap, m_s, s_s, u_s)
        e_s = e_s * keep + tl.sum(e * z_s, 1)
        return m_s, s_s, u_s, e_s, m_t, s_t, u_t, y_s, y_t


@triton.jit(do_not_specialize=["T", "V", "row_blocks", "splits"])
def row_sums_kernel(
    student, teacher, head, teacher_head, bias, target, shift, partial_P9T,
    T, V, D, teacher_D, student_stride, teacher_stride, head_stride, teacher_head_stride,
    row_blocks, splits, inner, outer,
    HAS_TEACHER: tl.constexpr, OWN_HEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The nine sums of BLOCK_T rows over one split -> partial_P9T.

    student, teacher, head, teacher_head: [T, D], [T, teacher_D], [V, D], [V, teacher_D], all bf16,
        fp16 or fp32; pointers, or with TMA descriptors of blocks [BLOCK_T or BLOCK_V, BLOCK_D].
        Elements of a row lie side by side; `..._stride` is from row to row, in elements.
    bias: [V] of any floating point dtype. target: [T] int64. shift: [T] fp32, what gaps are less.
    partial_P9T: [splits, 9, T] fp32, dense; columns as in sums.py.
    row_blocks, splits: the grid is their product, GROUP row blocks walk the splits together.
    inner, outer: of `scaled`, fp32.
    Without HAS_TEACHER, HAS_BIAS, HAS_SHIFT the pointer is None, without OWN_HEAD teacher_head and
    teacher_D. UPCAST: 16-bit tiles are multiplied as fp32. SPLIT: columns of a split.
    """
    program = tl.program_id(0)
    group = program // (GROUP * splits)
    inside_group = program % (GROUP * splits)
    group_rows = tl.minimum(row_blocks - group * GROUP, GROUP)
    first_row = (group * GROUP + inside_group % group_rows) * BLOCK_T
    split = inside_group // group_rows

    row = first_row + tl.arange(0, BLOCK_T)
    row_exists = row < T
    y = tl.load(target + row, row_exists, 0).to(tl.int32)
    offset = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_SHIFT:
        offset = tl.load(shift + row, row_exists, 0.0)
    m_s = tl.full((BLOCK_T,), LOWEST, tl.float32)
    m_t = tl.full((BLOCK_T,), LOWEST, tl.float32)
    s_s = tl.zeros((BLOCK_T,), tl.float32)
    s_t = tl.zeros((BLOCK_T,), tl.float32)
    u_s = tl.zeros((BLOCK_T,), tl.float32)
    u_t = tl.zeros((BLOCK_T,), tl.float32)
    e_s = tl.zeros((BLOCK_T,), tl.float32)
    y_s = tl.zeros((BLOCK_T,), tl.float32)
    y_t = tl.zeros((BLOCK_T,), tl.float32)

    for first_column in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), BLOCK_V):
        x_s = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        x_t = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, D, BLOCK_D):
            w = _load_tile(head, first_column, k, V, D, head_stride, TMA, BLOCK_V, BLOCK_D)
            h = _load_tile(student, first_row, k, T, D, student_stride, TMA, BLOCK_T, BLOCK_D)
            x_s = _dot(h, w, x_s, UPCAST)
            if HAS_TEACHER and not OWN_HEAD:
                h = _load_tile(teacher, first_row, k, T, D, teacher_stride, TMA, BLOCK_T, BLOCK_D)
                x_t = _dot(h, w, x_t, UPCAST)
        if OWN_HEAD:
            for k in range(0, teacher_D, BLOCK_D):
                w = _load_tile(
                    teacher_head, first_column, k, V, teacher_D, teacher_head_stride,
                    TMA, BLOCK_V, BLOCK_D,
                )  # fmt: skip
                h = _load_tile(
                    teacher, first_row, k, T, teacher_D, teacher_stride, TMA, BLOCK_T, BLOCK_D
                )
                x_t = _dot(h, w, x_t, UPCAST)
        m_s, s_s, u_s, e_s, m_t, s_t, u_t, y_s, y_t = _fold(
            (m_s, s_s, u_s, e_s, m_t, s_t, u_t, y_s, y_t),
            x_s, x_t, first_column, y, offset, bias, V, inner, outer,
            HAS_TEACHER, HAS_BIAS, SOFTCAP, PIECES,
        )  # fmt: skip

    out = partial_P9T + split.to(tl.int64) * SUMS * T + row
    tl.store(out + STUDENT_MOST * T, m_s, row_exists)
    tl.store(out + STUDENT_MASS * T, s_s, row_exists)
    tl.store(out + STUDENT_GAP * T, u_s, row_exists)
    tl.store(out + STUDENT_ENERGY * T, e_s, row_exists)
    tl.store(out + TEACHER_MOST * T, m_t, row_exists)
    tl.store(out + TEACHER_MASS * T, s_t, row_exists)
    tl.store(out + TEACHER_GAP * T, u_t, row_exists)
    tl.store(out + STUDENT_TARGET * T, y_s, row_exists)
    tl.store(out + TEACHER_TARGET * T, y_t, row_exists)


@triton.jit(do_not_specialize=["T", "splits"])
def merge_kernel(partial_P9T, sums_T9, T, splits, HAS_TEACHER: tl.constexpr, BLOCK_T: tl.constexpr):
    """sums_T9 [T, 9] <- the sums of each row's splits, partial_P9T [splits, 9, T], in their order.

    Both fp32 and dense.
    """
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_exists = row < T
    m_s = tl.full((BLOCK_T,), LOWEST, tl.float32)
    m_t = tl.full((BLOCK_T,), LOWEST, tl.float32)
    s_s = tl.zeros((BLOCK_T,), tl.float32)
    s_t = tl.zeros((BLOCK_T,), tl.float32)
    u_s = tl.zeros((BLOCK_T,), tl.float32)
    u_t = tl.zeros((BLOCK_T,), tl.float32)
    e_s = tl.zeros((BLOCK_T,), tl.float32)
    y_s = tl.zeros((BLOCK_T,), tl.float32)
    y_t = tl.zeros((BLOCK_T,), tl.float32)
    part = partial_P9T + row
    for _ in range(splits):
        m = tl.load(part + STUDENT_MOST * T, row_exists, 0.0)
        highest = tl.maximum(m_s, m)
        old = tl.exp(m_s - highest)
        new = tl.exp(m - highest)
        s_s = s_s * old + tl.load(part + STUDENT_MASS * T, row_exists, 0.0) * new
        u_s = u_s * old + tl.load(part + STUDENT_GAP * T, row_exists, 0.0) * new
        e_s = e_s * old + tl.load(part + STUDENT_ENERGY * T, row_exists, 0.0) * new
        y_s += tl.load(part + STUDENT_TARGET * T, row_exists, 0.0)
        m_s = highest
        if HAS_TEACHER:
            m = tl.load(part + TEACHER_MOST * T, row_exists, 0.0)
            highest = tl.maximum(m_t, m)
            old = tl.exp(m_t - highest)
            new = tl.exp(m - highest)
            s_t = s_t * old + tl.load(part + TEACHER_MASS * T, row_exists, 0.0) * new
            u_t = u_t * old + tl.load(part + TEACHER_GAP * T, row_exists, 0.0) * new
            y_t += tl.load(part + TEACHER_TARGET * T, row_exists, 0.0)
            m_t = highest
        part += SUMS * T
    if not HAS_TEACHER:
        m_t = s_t
    out = sums_T9 + row.to(tl.int64) * SUMS
    tl.store(out + STUDENT_MOST, m_s, row_exists)
    tl.store(out + STUDENT_MASS, s_s, row_exists)
    tl.store(out + STUDENT_GAP, u_s, row_exists)
    tl.store(out + STUDENT_ENERGY, e_s, row_exists)
    tl.store(out + TEACHER_MOST, m_t, row_exists)
    tl.store(out + TEACHER_MASS, s_t, row_exists)
    tl.store(out + TEACHER_GAP, u_t, row_exists)
    tl.store(out + STUDENT_TARGET, y_s, row_exists)
    tl.store(out + TEACHER_TARGET, y_t, row_exists)
