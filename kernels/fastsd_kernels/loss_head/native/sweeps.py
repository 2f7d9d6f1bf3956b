"""The loss head in C++ on a CPU: two sweeps over the vocabulary, rows of terms in between.

Sweep one (csrc/forward.h) forms the logits of both streams tile by tile in fp32 and folds each
tile into row statistics while it is in L1; nothing of [T, V] remains but, where a gradient is
wanted, a scratch of 4 B (bf16 inputs) or 8 B a logit pair. Here the row statistics become the loss
and a few coefficients a row. Sweep two (csrc/backward.h) turns scratch and coefficients into the
gradient of a group of columns at a time, and multiplies it into d student_TD and d head_VD while it
is in cache. Four GEMMs a token in all, and the gradient in the logits never goes to memory.

The scratch, SCRATCH_BYTES at most, bounds T x V; the first D / 2 rows or so cost nothing of it,
they are kept where d head_VD will be written. More rows go in chunks; the head's gradient is then
summed in fp32 [V, D]. Where that sum alone would break the bound, rows beyond the scratch are not
kept but computed again in sweep two (six GEMMs for those).
Shape suffixes: T rows, D hidden size, V vocabulary, K buckets of a divergence, C columns of row
statistics.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import native_library as lib
from ..contract import Evaluation, Inputs, Options, RowStatistics
from .row_terms import RowTerms, row_terms

SCRATCH_BYTES = 240_000_000
# Below so many rows a chunk, packing the head again for each costs more than computing again.
_SMALLEST_CHUNK = 256
_STATISTICS_CHUNK = 4096


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if it can run there, else the reason and what to do."""
    if device.type != "cpu":
        return f"native runs on CPU tensors, got {device}; use impl='triton' or impl='chunked'"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"native takes float32 and bfloat16, got {dtype}; use impl='chunked' or cast"
    return lib.missing()


def evaluate(inputs: Inputs, options: Options, wanted: tuple[bool, ...]) -> Evaluation:
    """Loss, statistics and the wanted gradients; see contract.py.

    Raises MemoryError where the C++ side finds no memory.
    """
    bias_dtype = None if inputs.bias_V is None else inputs.bias_V.dtype
    inputs = _plain(inputs)
    needs = Needs.of(inputs, options, any(wanted))
    plan = _plan(inputs, needs, wanted)
    gradients = _Gradients(inputs, wanted, plan)
    parts = [
        _evaluate_rows(inputs, options, needs, plan, gradients, start)
        for start in range(0, inputs.student_TD.shape[0], plan.chunk) or (0,)
    ]
    loss = torch.stack([terms.loss_T.sum() for terms in parts]).sum()
    return Evaluation(loss.float(), _joined(parts), gradients.results(bias_dtype))


def statistics(inputs: Inputs, options: Options) -> RowStatistics:
    """The statistics alone, without sweep two; raises MemoryError too."""
    return evaluate(inputs, options, (False, False, False)).statistics


class Needs(NamedTuple):
    """What a call must keep between the sweeps, and what it does in between."""

    keep: int
    sums: bool  # the divergence needs both normalisers first
    top: bool  # the k likeliest entries

    @classmethod
    def of(cls, inputs: Inputs, options: Options, gradient: bool) -> Needs:
        """What a call with these arguments needs; the compact forms only where they suffice."""
        full = inputs.teacher_TD is not None and options.divergence != "sampled_token"
        top = full and options.top_k is not None
        late = options.divergence == "jsd" or options.entry_clip is not None
        sums = full and late and not top
        if not (gradient or sums or top):
            return cls(lib.NOTHING, sums, top)
        logits = (
            inputs.student_TD.dtype != torch.bfloat16
            or lib.instruction_set() != "avx512_bf16"
            or inputs.entropy_weight_T is not None
            or options.softcap is not None
            or (full and options.entry_clip is not None)
            or top
        )
        if logits:
            return cls(lib.LOGITS, sums, top)
        if not full or not (sums or inputs.divergence_weight_T is not None):
            return cls(lib.STUDENT, sums, top)
        gap = lib.STUDENT_GAP if options.divergence == "reverse_kl" else lib.LARGER_GAP
        return cls(gap, sums, top)


class Plan(NamedTuple):
    chunk: int  # rows at a time
    kept: int  # of which the scratch holds
    borrowed: int  # of which the memory of d head_VD holds
    scratch: Tensor


def _plan(inputs: Inputs, needs: Needs, wanted: tuple[bool, ...]) -> Plan:
    rows, (vocabulary, width) = inputs.student_TD.shape[0], inputs.head_VD.shape
    if needs.keep == lib.NOTHING:
        return Plan(min(max(rows, 1), _STATISTICS_CHUNK), 0, 0, lib.aligned(0))
    rows, narrow = max(rows, 1), inputs.head_VD.dtype != torch.float32
    room = lib.borrowed_rows(needs.keep, width * inputs.head_VD.itemsize) if wanted[1] else 0

    def plan(chunk: int, kept: int, room: int) -> Plan:
        borrowed = min(kept, room)
        count = lib.scratch_bytes(needs.keep, kept, borrowed, vocabulary)
        return Plan(chunk, kept, borrowed, lib.aligned(count))

    each = lib.scratch_bytes(needs.keep, 1, 0, vocabulary)
    each_borrowed = lib.scratch_bytes(needs.keep, 1, 1, vocabulary)
    work = _work_bytes(inputs)

    def fit(budget: int, room: int, work: int) -> int:
        """Rows that a budget of bytes keeps, beside those in d head and their work."""
        borrowed = min(room, max(0, budget) // (each_borrowed + work))
        left = budget - borrowed * (each_borrowed + work)
        return borrowed + max(0, left) // (each + work)

    most = max(1, fit(SCRATCH_BYTES, room, work))
    if rows <= most:
        return plan(rows, rows, room)
    # Several chunks: d head_VD is summed in fp32, for fp32 inputs where it would be borrowed.
    sum_bytes = 4 * vocabulary * width if wanted[1] and narrow else 0
    left = fit(SCRATCH_BYTES - sum_bytes, room if narrow else 0, work)
    if sum_bytes and left < min(_SMALLEST_CHUNK, most):
        if not needs.top:
            kept = fit(SCRATCH_BYTES - rows * work, room, 0)
            return plan(rows, max(1, min(rows, kept)), room)
        left = most // 4  # picked entries cannot be computed again: over the bound
    chunk = -(-rows // -(-rows // max(1, left)))
    return plan(chunk, chunk, room if narrow else 0)


def _work_bytes(inputs: Inputs) -> int:
    """Bytes a row takes besides its scratch: packed operands, d hidden by thread, partial sums."""
    (vocabulary, width), item = inputs.head_VD.shape, inputs.head_VD.itemsize
    widths = width + (0 if inputs.teacher_TD is None else inputs.teacher_TD.shape[1])
    by_thread = 4 * width + 3 * 256 * item + 1024
    return item * (widths + width) + torch.get_num_threads() * by_thread + vocabulary // 32


class _Gradients:
    """The results, and the head's sum over chunks in fp32 where there are several."""

    def __init__(self, inputs: Inputs, wanted: tuple[bool, ...], plan: Plan):
        student, head, bias = inputs.student_TD, inputs.head_VD, inputs.bias_V
        self.any = any(wanted)
        self.student_TD = torch.empty_like(student) if wanted[0] else None
        self.head_VD = lib.empty(head) if wanted[1] else None
        self.bias_V = torch.zeros_like(bias) if wanted[2] and bias is not None else None
        self.sum_VD = None
        if wanted[1] and student.shape[0] > plan.chunk:
            narrow = head.dtype != torch.float32
            fp32 = head.new_empty(0, dtype=torch.float32)
            self.sum_VD = lib.empty(fp32, head.numel()) if narrow else self.head_VD

    def results(self, bias_dtype: torch.dtype | None):
        bias_V = None if self.bias_V is None else self.bias_V.to(bias_dtype)
        return self.student_TD, self.head_VD, bias_V


def _evaluate_rows(
    inputs: Inputs, options: Options, needs: Needs, plan: Plan, gradients: _Gradients, start: int
) -> RowTerms:
    """One chunk: both sweeps and the row terms between them."""
    part = _rows_of(inputs, start, start + plan.chunk)
    statistics_TC = torch.empty(part.student_TD.shape[0], len(lib.COLUMNS), dtype=torch.float64)
    problem = _problem(part, options, needs.keep, plan, gradients.head_VD, statistics_TC)
    lib.call("statistics", problem)
    sums_T3 = top = None
    if needs.sums:
        sums_T3 = torch.empty(statistics_TC.shape[0], 3, dtype=torch.float64)
        lib.call("divergence_sums", problem, _gradient(options), sums_T3)
    if needs.top and options.top_k is not None:
        top = _top(problem, statistics_TC.shape[0], options.top_k)
    terms = row_terms(part, options, statistics_TC, sums_T3, top, gradients.any)
    if gradients.any:
        lib.call("gradient", problem, _gradient(options, terms, gradients, start, inputs))
    return terms


def _top(problem: lib.Problem, rows: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [T, K], logits of both streams [T, 2, K], log mass of the others [T, 2]."""
    index_TK = torch.empty(rows, k, dtype=torch.int64)
    logits_T2K = torch.empty(rows, 2, k, dtype=torch.float32)
    rest_T2 = torch.empty(rows, 2, dtype=torch.float64)
    lib.call("top", problem, k, index_TK, logits_T2K, rest_T2)
    return index_TK, logits_T2K, rest_T2


def _problem(
    part: Inputs,
    options: Options,
    keep: int,
    plan: Plan,
    d_head_VD: Tensor | None,
    statistics_TC: Tensor,
) -> lib.Problem:
    student, head, teacher = part.student_TD, part.head_VD, part.teacher_TD
    own = part.teacher_head_VD
    rows, cap = student.shape[0], options.softcap
    return lib.problem(
        student=student, teacher=teacher, head=head, teacher_head=own, bias=part.bias_V,
        target=part.target_T, rows=rows, width=student.shape[1],
        teacher_width=0 if teacher is None else teacher.shape[1], vocabulary=head.shape[0],
        student_stride=student.stride(0), teacher_stride=_stride(teacher),
        head_stride=head.stride(0), teacher_head_stride=_stride(own),
        dtype=lib.BF16 if student.dtype == torch.bfloat16 else lib.F32, keep=keep,
        threads=torch.get_num_threads(),
        scale=options.logit_scale / (options.temperature if cap is None else cap),
        softcap=0.0 if cap is None else cap / options.temperature,
        kept_rows=min(plan.kept, rows), borrowed_rows=min(plan.borrowed, rows),
        borrowed=d_head_VD, borrowed_stride=lib.panel() * head.shape[1] * head.itemsize,
        scratch=plan.scratch, statistics=statistics_TC,
    )  # fmt: skip


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _gradient(
    options: Options,
    terms: RowTerms | None = None,
    out: _Gradients | None = None,
    start: int = 0,
    inputs: Inputs | None = None,
) -> lib.Gradient:
    """The options of the divergence; with row terms and results: all that sweep two needs."""
    kind = options.divergence if options.top_k is None else "none"
    common = {
        "divergence": lib.DIVERGENCES.get(kind, 0),
        "beta": options.beta,
        "entry_clip": options.entry_clip or 0.0,
    }
    if terms is None or out is None or inputs is None:
        return lib.gradient(**common)
    stop = start + terms.everywhere_T.shape[0]
    return lib.gradient(
        **common, everywhere=terms.everywhere_T, weight=terms.weight_T, entropy=terms.entropy_T,
        pull=terms.pull_T, top_k=0 if terms.index_TK is None else terms.index_TK.shape[1],
        top_index=terms.index_TK, top_value=terms.value_TK, tail=terms.tail_T, rest=terms.rest_T,
        softcap_inverse=0.0 if options.softcap is None else options.temperature / options.softcap,
        d_student=None if out.student_TD is None else out.student_TD[start:stop],
        d_head=out.head_VD, d_bias=out.bias_V, sum=out.sum_VD,
        first=start == 0, last=stop == inputs.student_TD.shape[0],
    )  # fmt: skip


def _plain(inputs: Inputs) -> Inputs:
    """As the C side reads them: unit column stride, fp32 bias, int64 targets, contiguous rows."""

    def plain(name: str, x) -> Any:
        if x is None:
            return None
        x = x.detach()
        if name.endswith("D"):
            return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
        return (x.float() if name == "bias_V" else x).contiguous()

    return Inputs(**{f.name: plain(f.name, getattr(inputs, f.name)) for f in fields(Inputs)})


def _rows_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    by_row = ("_TD", "_T")
    named = {f.name: getattr(inputs, f.name) for f in fields(Inputs)}
    cut = {k: x[start:stop] for k, x in named.items() if x is not None and k.endswith(by_row)}
    return replace(inputs, **cut)


def _joined(parts: list[RowTerms]) -> RowStatistics:
    found = {}
    for field in fields(RowStatistics):
        values = [getattr(part.statistics, field.name) for part in parts]
        found[field.name] = None if values[0] is None else torch.cat(values)
    return RowStatistics(**found)
