"""Plan A on a GPU (impl="triton"): token chunk x full vocabulary, gradient formed in the forward.

    GEMM    [h_s; h_t] W^T -> fp32 scratch       stacked_products.py
    kernel  the nine sums of each row            scratch.py; jsd, entry_clip: one read more
    kernel  statistics, loss, coefficients       finish.py
    kernel  dloss / dlogits (bf16 for bf16)      scratch.py
    GEMMs   d h = g W,  d W += g^T h             stacked_products.py

Four GEMMs per row of both streams (three with a frozen head, two without gradient), no [T, V]
tensor, and `bytes_per_logit` of memory traffic. Chunks are of equal size, from T and a budget of
scratch and never from V / D, so each is a large GEMM. Statistics that need no logits twice come
from plan B's tile (tile.py) in O(T) memory.

Nothing here waits for the device. Row kernels give a row the same bits whatever the other rows
are; the GEMM library may choose another kernel for another number of rows.
Triton's interpreter (TRITON_INTERPRET=1) runs all of it on a CPU. Speed on a GPU: not measured.
Shape suffixes: T rows (of a chunk within one), D hidden size, V vocabulary, 9 row sums, E entry
sums, C coefficients, R results.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..contract import Evaluation, Inputs, Options, RowStatistics

# Modules with kernels import triton and are imported when first run.
if TYPE_CHECKING:
    from .scratch import Scratch
    from .stacked_products import StackedProducts
    from .top_k import TopK

# Bytes of scratch, at most, and of the memory that is free, at most.
SCRATCH_BYTES = 1 << 30
_FREE_SHARE = 0.5
# Columns of a vocabulary slice where memory is short, at most.
SLICE_COLUMNS = 8192
# Chunks start at multiples of this, so that all meet the same alignment and one compiled kernel.
_ALIGNED_ROWS = 16


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this implementation can run, else the reason and what to do."""
    if find_spec("triton") is None:
        return "triton is not installed; install it or use impl='chunked'"
    if dtype == torch.float64:
        return "its kernels compute in fp32; use impl='chunked' or impl='reference' for fp64"
    from triton import knobs

    if device.type == "cuda" or knobs.runtime.interpret:
        return None
    return f"it needs a CUDA device, got {device}; use impl='chunked'"


def evaluate(inputs: Inputs, options: Options, wanted: tuple[bool, bool, bool]) -> Evaluation:
    """Loss, statistics and the wanted gradients; see contract.py."""
    with torch.no_grad(), torch.cuda.device_of(inputs.student_TD):
        inputs = _contiguous(inputs)
        if wanted[1] and not _needs_scratch(inputs, options) and _short_of_memory(inputs):
            return _run_in_slices(inputs, options, wanted)
        return _run(inputs, options, wanted)


def statistics(inputs: Inputs, options: Options) -> RowStatistics:
    """The statistics alone: by the tile where one pass over the logits suffices."""
    with torch.no_grad(), torch.cuda.device_of(inputs.student_TD):
        inputs = _contiguous(inputs)
        if _needs_scratch(inputs, options):
            return _run(inputs, options, (False, False, False)).statistics
        return _tile_statistics(inputs, options)


def bytes_per_logit(inputs: Inputs, options: Options, wanted: tuple[bool, bool, bool]) -> int:
    """Bytes of scratch moved per row and vocabulary entry (of both streams), GEMMs included."""
    streams = 1 if inputs.teacher_TD is None else 2
    width = 2 if inputs.student_TD.dtype == torch.bfloat16 else 4
    reads = 2 if _needs_entry_sums(inputs, options) else 1
    total = 4 * streams * (1 + reads)
    if not any(wanted):
        return total
    both = streams == 2 and inputs.divergence_weight_T is not None
    both = both and options.divergence != "sampled_token"
    return total + 4 * (2 if both else 1) + width * (1 + sum(wanted))


def _run(inputs: Inputs, options: Options, wanted: tuple[bool, bool, bool]) -> Evaluation:
    from .finish import RESULTS
    from .stacked_products import StackedProducts, scratch_bytes_per_row

    rows, device = inputs.student_TD.shape[0], inputs.student_TD.device
    chunk = _rows_per_chunk(rows, scratch_bytes_per_row(inputs, any(wanted)), device)
    products = StackedProducts(inputs, wanted, chunk)
    results_RT = torch.empty(len(RESULTS), _round_up(rows), device=device)[:, :rows]
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        _run_chunk(
            products, _span(inputs, start, stop), options, any(wanted), results_RT, start, stop
        )
    return _evaluation(results_RT, inputs, options, products.gradients())


def _run_chunk(
    products: StackedProducts,
    rows: Inputs,
    options: Options,
    gradient: bool,
    results_RT: Tensor,
    start: int,
    stop: int,
) -> None:
    """Results and gradients of rows start to stop, which `rows` holds."""
    from .finish import finish_rows
    from .row_kernels import COEFFICIENTS
    from .scratch import row_gradients, row_sums
    from .sums import empty_sums
    from .top_k import write_gradient

    scratch = products.project(start, stop)
    if _selects(rows, options):
        scratch = scratch.with_bias_added()
    sums_T9 = empty_sums(stop - start, results_RT)
    row_sums(scratch, rows.target_T, options, sums_T9)
    entries_TE, found = _entries(scratch, rows, options, sums_T9, gradient)
    coefficients_TC = None
    if gradient:
        coefficients_TC = results_RT.new_empty(stop - start, COEFFICIENTS.value)
    finish_rows(
        sums_T9, rows, options, results_RT[:, start:stop],
        entries_TE=entries_TE, coefficients_TC=coefficients_TC,
    )  # fmt: skip
    if coefficients_TC is None:
        return
    g_TV = products.gradient_buffer(scratch)
    row_gradients(scratch, rows, options, coefficients_TC, g_TV)
    if found is not None:
        write_gradient(found, rows, options, coefficients_TC, g_TV)
    products.add_gradients(g_TV, start, stop)


def _entries(
    scratch: Scratch, rows: Inputs, options: Options, sums_T9: Tensor, gradient: bool
) -> tuple[Tensor | None, TopK | None]:
    """Entry sums where the nine sums do not give the divergence; the k entries with top_k."""
    from .scratch import entry_sums
    from .top_k import top_k

    if _selects(rows, options):
        found = top_k(scratch, rows.target_T, options, sums_T9, gradient)
        return found.entries_TE, found
    if not _needs_entry_sums(rows, options):
        return None, None
    entries_TE = sums_T9.new_empty(sums_T9.shape[0], 5)
    entry_sums(scratch, options, sums_T9, entries_TE)
    return entries_TE, None


def _tile_statistics(inputs: Inputs, options: Options) -> RowStatistics:
    from .finish import finish_rows

    sums_T9, shift_T, results_RT = _tile_sums(inputs, options)
    finish_rows(sums_T9, inputs, options, results_RT, shift_T=shift_T)
    return _evaluation(results_RT, inputs, options, (None, None, None)).statistics


def _run_in_slices(inputs: Inputs, options: Options, wanted: tuple[bool, bool, bool]) -> Evaluation:
    from .low_memory import sliced_gradients

    sums_T9, shift_T, results_RT = _tile_sums(inputs, options)
    each = 12 * inputs.student_TD.shape[0]  # two fp32 logits and, at most, an fp32 gradient
    columns = max(_ALIGNED_ROWS, _scratch_bytes(inputs.student_TD.device) // each)
    gradients = sliced_gradients(
        inputs, options, wanted, sums_T9, shift_T, results_RT, min(columns, SLICE_COLUMNS)
    )
    return _evaluation(results_RT, inputs, options, gradients)


def _short_of_memory(inputs: Inputs) -> bool:
    """Would plan A's fp32 sum of the head's gradient take over half of what is free?"""
    device = inputs.student_TD.device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    return 4 * inputs.head_VD.numel() > _FREE_SHARE * _free_bytes(device)


def _tile_sums(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor | None, Tensor]:
    """The tile's row sums, the shift they are relative to, and room for the results."""
    from .finish import RESULTS
    from .sums import STUDENT_ENERGY, STUDENT_MASS, STUDENT_MOST
    from .tile import row_sums

    shift_T = None if inputs.teacher_TD is None else _shift(inputs, options)
    sums_T9 = row_sums(
        inputs.student_TD, inputs.head_VD, inputs.target_T, teacher_TD=inputs.teacher_TD,
        teacher_head_VD=inputs.teacher_head_VD, bias_V=inputs.bias_V, shift_T=shift_T,
        options=options,
    )  # fmt: skip
    # The tile sums e^(z - m) z, the row kernel e^(z - m) (z - m).
    most_T, mass_T = sums_T9[:, STUDENT_MOST.value], sums_T9[:, STUDENT_MASS.value]
    sums_T9[:, STUDENT_ENERGY.value] -= most_T * mass_T
    rows, device = inputs.student_TD.shape[0], inputs.student_TD.device
    return sums_T9, shift_T, torch.empty(len(RESULTS), _round_up(rows), device=device)[:, :rows]


def _shift(inputs: Inputs, options: Options) -> Tensor:
    """About z_s - z_t of each row: that of its target; exactly 0 for equal streams."""
    from .scratch import target_logits

    teacher_head_VD = inputs.head_VD if inputs.teacher_head_VD is None else inputs.teacher_head_VD
    assert inputs.teacher_TD is not None
    bias_V = None if inputs.bias_V is None else inputs.bias_V.float().contiguous()
    z = torch.empty(2, _round_up(inputs.target_T.shape[0]), device=inputs.student_TD.device)
    z = z[:, : inputs.target_T.shape[0]]
    target_logits(inputs.student_TD, inputs.head_VD, bias_V, inputs.target_T, options, z[0])
    target_logits(inputs.teacher_TD, teacher_head_VD, bias_V, inputs.target_T, options, z[1])
    return z[0] - z[1]


def _evaluation(
    results_RT: Tensor,
    inputs: Inputs,
    options: Options,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Evaluation:
    from .finish import RESULTS

    found = dict(zip(RESULTS, results_RT, strict=True))
    loss = found.pop("loss_T").sum()
    policy_clipped, entry_clipped = found.pop("policy_clipped_T"), found.pop("entry_clipped_T")
    if inputs.teacher_TD is None:
        del found["divergence_T"], found["teacher_logprob_T"]
    statistics = RowStatistics(
        **{name: value.clone() for name, value in found.items()},
        policy_clipped_T=policy_clipped != 0 if options.clip is not None else None,
        entry_clipped_T=entry_clipped.long() if _clips_entries(inputs, options) else None,
    )
    return Evaluation(loss, statistics, gradients)


def _clips_entries(inputs: Inputs, options: Options) -> bool:
    return inputs.teacher_TD is not None and options.entry_clip is not None


def _needs_entry_sums(inputs: Inputs, options: Options) -> bool:
    if inputs.teacher_TD is None or options.top_k is not None:
        return False
    return options.divergence == "jsd" or options.entry_clip is not None


def _needs_scratch(inputs: Inputs, options: Options) -> bool:
    return _selects(inputs, options) or _needs_entry_sums(inputs, options)


def _selects(inputs: Inputs, options: Options) -> bool:
    """Is the divergence one over the k likeliest entries?"""
    return inputs.teacher_TD is not None and options.top_k is not None


def _rows_per_chunk(rows: int, bytes_per_row: int, device: torch.device) -> int:
    """The fewest chunks that fit the scratch, of equal size."""
    most = max(1, _scratch_bytes(device) // bytes_per_row)
    if most > _ALIGNED_ROWS:
        most -= most % _ALIGNED_ROWS
    chunks = max(1, -(-rows // most))
    return max(1, min(most, _round_up(-(-rows // chunks))))


def _scratch_bytes(device: torch.device) -> int:
    """SCRATCH_BYTES, so the same chunks in every run, unless memory is about to run out."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return SCRATCH_BYTES
    return min(SCRATCH_BYTES, int(_free_bytes(device) * _FREE_SHARE))


def _free_bytes(device: torch.device) -> int:
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _round_up(rows: int) -> int:
    return -(-rows // _ALIGNED_ROWS) * _ALIGNED_ROWS


def _contiguous(inputs: Inputs) -> Inputs:
    """Row vectors without gaps, as the kernels read them."""
    values = {
        name: value.contiguous()
        for name, value in vars(inputs).items()
        if name.endswith("_T") and value is not None
    }
    return replace(inputs, **values)


def _span(inputs: Inputs, start: int, stop: int) -> Inputs:
    by_row = {
        name: value[start:stop]
        for name, value in vars(inputs).items()
        if name.endswith(("_T", "_TD")) and value is not None
    }
    return replace(inputs, **by_row)
