"""Plan B on the GPU: both streams' row sums from one tl.dot tile, in O(T) memory, no logits kept.

A program owns BLOCK_T rows and a split of SPLIT vocabulary columns. It walks the split in BLOCK_V
columns: two products with one head tile (a head tile read once feeds student and teacher), fp32
accumulators in registers, and nine running sums per row folded over the tile:

    m = max z,  S = sum e^(z - m),  U = sum e^(z - m) (d - shift)        of either stream
    E = sum e^(z_s - m_s) z_s,  z_s[y],  z_t[y]                          d = z_s - z_t

A second kernel merges the splits in their order. Splits are a fixed number of columns and tiles
come from a table, so a row's nine numbers depend on neither T nor its neighbours, to the bit.

The sums hold d - shift, not d: KL(S||T) = U_s/S_s + shift - (m_s - m_t) - log(S_s/S_t) loses
nothing to cancellation where `shift` is close to d. No product is contracted with a sum
(enable_fp_fusion=False): fma(x_s, scale, -z_t) would make d non-zero for equal streams.

Tiles come by TMA descriptors where the table says so and the strides allow (`accesses`), else
by pointers; the arithmetic is the same. Speed on a GPU: not measured; this form is for memory.
Shape suffixes: T rows, D hidden size, V vocabulary, P vocabulary splits, 9 the sums above.
Tile shapes in comments: R = BLOCK_T rows, C = BLOCK_V columns, K = BLOCK_D.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ..contract import Options
from .configs import SPLIT_COLUMNS, AotCase, Capability, TileConfig, tile_config
from .scratch import launch, logit_factors
from .sums import empty_partial_sums, empty_sums
from .tile_kernels import merge_kernel, row_sums_kernel

# Row blocks that walk the splits together: their hidden states stay in L2, a head tile serves all.
_GROUP = 8
_MERGE_ROWS = 128
_MATRICES = ("student_TD", "teacher_TD", "head_VD", "teacher_head_VD")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ACCESSES = ("tma", "pointers", "scalar")
_STREAMS = ("student", "shared head", "own head")


def row_sums(
    student_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    teacher_TD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    shift_T: Tensor | None = None,
    options: Options,
) -> Tensor:
    """The nine sums of sums.py of every row; nothing is differentiable.

        z = softcap(logit_scale (h W^T + b)) / temperature on both sides, d = z_s - z_t
        m = max z,  S = sum e^(z - m),  U = sum e^(z - m) (d - shift),  E = sum e^(z_s - m_s) z_s

    Args as `fused_linear_loss`, on one CUDA device (any device under Triton's interpreter).
        student_TD, head_VD, teacher_TD, teacher_head_VD: bf16, fp16 or fp32, all of one dtype,
        products accumulated in fp32 (fp32 ones in IEEE fp32, no tensor cores). Rows contiguous,
        or they are copied.
        shift_T: [T] fp32, about the mean of d in each row; None: 0.
        options: temperature, logit_scale and softcap are read.

    Memory: 36 bytes a row for each 4,096 vocabulary columns, and the result.
    Returns: sums_T9, [T, 9] fp32, E as sum e^(z - m) z. Without a teacher STUDENT_GAP and the
        TEACHER_ columns are 0.
    Raises: TypeError for another dtype.
    """
    given = (student_TD, teacher_TD, head_VD, teacher_head_VD)
    for name, x in zip(_MATRICES, given, strict=True):
        if x is not None and (x.dtype not in _DTYPES.values() or x.dtype != student_TD.dtype):
            raise TypeError(
                f"{name}: expected bfloat16, float16 or float32 like student_TD, got {x.dtype}; "
                "cast it or choose impl='chunked'"
            )
    rows = student_TD.shape[0]
    splits = triton.cdiv(head_VD.shape[0], SPLIT_COLUMNS)
    sums_T9 = empty_sums(rows, student_TD)
    if rows == 0:
        return sums_T9
    partial_P9T = empty_partial_sums(splits, rows, student_TD)
    with torch.cuda.device_of(student_TD):
        matrices = [_with_plain_rows(x) for x in given]
        _launch_row_sums(matrices, bias_V, target_T, shift_T, partial_P9T, options)
        _launch_merge(partial_P9T, sums_T9, teacher_TD is not None)
    return sums_T9


def accesses(matrices: Sequence[Tensor | None]) -> tuple[str, ...]:
    """How tiles of all the matrices given can be read, best first; `tile_config` has the words.

    "tma": descriptors need 16-byte bases and row strides, and rows that do not overlap.
    "pointers": vector loads need 16-byte bases, and widths and strides of 16 k elements.
    "scalar": the rest. Widths and strides decide, not T.
    """
    given = [x for x in matrices if x is not None]
    aligned = all(x.data_ptr() % 16 == 0 for x in given)
    tma = aligned and all(
        0 < x.shape[1] <= x.stride(0) and x.stride(0) * x.element_size() % 16 == 0 for x in given
    )
    vectors = aligned and all(x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 for x in given)
    return (*(["tma"] if tma else []), "pointers" if vectors else "scalar")


def _with_plain_rows(x: Tensor | None) -> Tensor | None:
    """Elements of a row side by side; the stride of an only row is its width, as in a batch."""
    if x is None:
        return None
    if x.shape[0] == 1:
        return x.reshape(-1).view(1, -1)
    return x if x.stride(1) == 1 else x.contiguous()


def _launch_row_sums(
    matrices: Sequence[Tensor | None],
    bias_V: Tensor | None,
    target_T: Tensor,
    shift_T: Tensor | None,
    partial_P9T: Tensor,
    options: Options,
) -> None:
    student_TD, teacher_TD, head_VD, teacher_head_VD = matrices
    assert student_TD is not None and head_VD is not None
    (rows, width), vocabulary = student_TD.shape, head_VD.shape[0]
    capability = torch.cuda.get_device_capability(student_TD.device) if student_TD.is_cuda else None
    streams = 1 if teacher_TD is None else 2
    config = tile_config(capability, student_TD.dtype, accesses(matrices), streams)
    row_blocks, splits = triton.cdiv(rows, config.BLOCK_T), partial_P9T.shape[0]
    blocks = (config.BLOCK_T, config.BLOCK_T, config.BLOCK_V, config.BLOCK_V)
    tiles = [
        TensorDescriptor.from_tensor(x, [block, config.BLOCK_D]) if config.TMA and x is not None
        else x
        for x, block in zip(matrices, blocks, strict=True)
    ]  # fmt: skip
    strides = [None if x is None else x.stride(0) for x in matrices]
    inner, outer = logit_factors(options)
    launch(
        row_sums_kernel, row_blocks * splits, *tiles, bias_V, target_T, shift_T, partial_P9T,
        rows, vocabulary, width, None if teacher_head_VD is None else teacher_head_VD.shape[1],
        *strides, row_blocks, splits, inner, outer,
        HAS_TEACHER=teacher_TD is not None, OWN_HEAD=teacher_head_VD is not None,
        HAS_BIAS=bias_V is not None, HAS_SHIFT=shift_T is not None and teacher_TD is not None,
        SOFTCAP=options.softcap is not None, UPCAST=knobs.runtime.interpret,
        SPLIT=SPLIT_COLUMNS, GROUP=_GROUP, **vars(config),
    )  # fmt: skip


def _launch_merge(partial_P9T: Tensor, sums_T9: Tensor, teacher: bool) -> None:
    rows = sums_T9.shape[0]
    launch(
        merge_kernel, triton.cdiv(rows, _MERGE_ROWS), partial_P9T, sums_T9, rows,
        partial_P9T.shape[0], HAS_TEACHER=teacher, BLOCK_T=_MERGE_ROWS, num_warps=4,
    )  # fmt: skip


def aot_cases(capability: Capability) -> list[AotCase]:
    """Every entry of the table for this architecture, in every variant that is launched.

    fp16 and scalar loads: with none of the options and with all of them.
    """
    cases = []
    for dtype, access, streams in product(_DTYPES, _ACCESSES, _STREAMS):
        count = 1 if streams == "student" else 2
        config = tile_config(capability, _DTYPES[dtype], (access, "pointers"), count)
        if access == "tma" and not config.TMA:
            continue
        options = ("bias", "softcap") if count == 1 else ("bias", "softcap", "shift")
        for flags in product((False, True), repeat=len(options)):
            chosen = tuple(name for name, on in zip(options, flags, strict=True) if on)
            common = dtype != "fp16" and access != "scalar"
            if common or len(chosen) in (0, len(options)):
                best = tile_config(capability, torch.bfloat16, _ACCESSES[:2], 2) == config
                typical = best and streams == "shared head" and len(chosen) == len(options)
                cases.append(_aot_case(dtype, access, config, streams, chosen, typical))
    constants = {"HAS_TEACHER": True, "BLOCK_T": _MERGE_ROWS}
    signature = {"partial_P9T": "*fp32", "sums_T9": "*fp32", "T": "i32", "splits": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    pointers = ("partial_P9T", "sums_T9")
    return [*cases, AotCase("merge", merge_kernel, signature, constants, pointers, num_warps=4)]


def _aot_case(
    dtype: str,
    access: str,
    config: TileConfig,
    streams: str,
    options: tuple[str, ...],
    representative: bool,
) -> AotCase:
    teacher, own = streams != "student", streams == "own head"
    constants = {
        "HAS_TEACHER": teacher, "OWN_HEAD": own, "HAS_BIAS": "bias" in options,
        "HAS_SHIFT": "shift" in options, "SOFTCAP": "softcap" in options, "UPCAST": False,
        "SPLIT": SPLIT_COLUMNS, "GROUP": _GROUP,
    } | {name: value for name, value in vars(config).items() if name.isupper()}  # fmt: skip
    present = {"teacher": teacher, "teacher_stride": teacher}
    present |= dict.fromkeys(("teacher_head", "teacher_head_stride", "teacher_D"), own)
    present |= {name: name in options for name in ("bias", "shift")}
    constants |= {name: None for name, given in present.items() if not given}
    rows = {"student": config.BLOCK_T, "teacher": config.BLOCK_T}
    rows |= {"head": config.BLOCK_V, "teacher_head": config.BLOCK_V}
    types = {
        name: f"tensordesc<{dtype}[{block},{config.BLOCK_D}]>" if config.TMA else f"*{dtype}"
        for name, block in rows.items()
    } | {"target": "*i64", "shift": "*fp32", "partial_P9T": "*fp32", "bias": f"*{dtype}"}
    types |= {"inner": "fp32", "outer": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in row_sums_kernel.arg_names}
    divisible = [name for name, kind in signature.items() if kind.startswith("*")]
    if access != "scalar":
        widths = [name for name in signature if name.endswith(("D", "stride"))]
        divisible += [name for name in widths if signature[name] == "i32"]
    return AotCase(
        " ".join(["tile", dtype, str(config), access, streams, *options]), row_sums_kernel,
        signature, constants, tuple(divisible), config.num_warps, config.num_stages,
        representative,
    )  # fmt: skip
