"""Training where memory is short (impl="triton"): plan B's row sums, then vocabulary slices.

Plan A sums the head's gradient over chunks of rows in fp32 [V, D] and keeps [c, V] logits. Here
the tile gives the row sums of all rows in O(T), and the coefficients follow; then for each slice of
the vocabulary the logits are computed again, [T, slice], turned into the gradient by plan A's
row kernel, and multiplied into both results. Each slice of d head_VD is whole at once and written
once, in its own dtype. Six GEMMs a token instead of four. What must see a row's logits together
(jsd, entry_clip, top_k) stays with plan A. Speed on a GPU: not measured.
Shape suffixes: T rows, D hidden size, V vocabulary, S a slice of it, 9 row sums, C coefficients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..contract import Inputs, Options
from .finish import finish_rows
from .row_kernels import COEFFICIENTS
from .scratch import row_gradients
from .stacked_products import StackedProducts, multiply

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def sliced_gradients(
    inputs: Inputs,
    options: Options,
    wanted: tuple[bool, bool, bool],
    sums_T9: Tensor,
    shift_T: Tensor | None,
    results_RT: Tensor,
    slice_columns: int,
) -> Gradients:
    """Writes results_RT (as finish_rows) and returns the gradients, slice by slice."""
    rows, vocabulary = inputs.student_TD.shape[0], inputs.head_VD.shape[0]
    coefficients_TC = results_RT.new_empty(rows, COEFFICIENTS.value)
    finish_rows(
        sums_T9, inputs, options, results_RT, shift_T=shift_T, coefficients_TC=coefficients_TC
    )
    d_hidden_TD = torch.empty_like(inputs.student_TD, dtype=torch.float32) if wanted[0] else None
    d_head_VD = torch.empty_like(inputs.head_VD) if wanted[1] else None
    bias_V = inputs.bias_V if wanted[2] else None
    d_bias_V = None if bias_V is None else torch.empty_like(bias_V)
    for start in range(0, vocabulary, slice_columns):
        part = _slice(inputs, start, min(start + slice_columns, vocabulary))
        products = StackedProducts(part, wanted, rows)
        scratch = products.project(0, rows)
        g_TS = products.gradient_buffer(scratch)
        row_gradients(scratch, part, options, coefficients_TC, g_TS)
        here = slice(start, start + part.head_VD.shape[0])
        if d_hidden_TD is not None:
            multiply(g_TS, part.head_VD.to(g_TS.dtype), d_hidden_TD, add=start > 0)
        if d_head_VD is not None:
            d_head_SD = torch.empty_like(part.head_VD, dtype=torch.float32)
            multiply(g_TS.T, inputs.student_TD.to(g_TS.dtype), d_head_SD)
            d_head_VD[here] = d_head_SD
        if d_bias_V is not None:
            d_bias_V[here] = g_TS.sum(0, dtype=torch.float32)
    d_student_TD = None if d_hidden_TD is None else d_hidden_TD.to(inputs.student_TD.dtype)
    return d_student_TD, d_head_VD, d_bias_V


def _slice(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Columns start to stop; a target outside them matches none."""
    own, bias_V = inputs.teacher_head_VD, inputs.bias_V
    return replace(
        inputs,
        head_VD=inputs.head_VD[start:stop],
        teacher_head_VD=None if own is None else own[start:stop],
        bias_V=None if bias_V is None else bias_V[start:stop],
        target_T=inputs.target_T - start,
    )
