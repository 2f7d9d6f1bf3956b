"""The shared library built from csrc/, loaded with ctypes: its structs, functions and whereabouts.

It has a plain C interface (csrc/fastsd_native.h), so it depends on no torch version, and ctypes
releases the GIL during a call. Nothing is loaded before the first use.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

F32, BF16 = 0, 1
DTYPES = {torch.float32: F32, torch.bfloat16: BF16}
NOTHING, STUDENT, STUDENT_GAP, LARGER_GAP, LOGITS = range(5)
DIVERGENCES = {"none": 0, "forward_kl": 1, "reverse_kl": 2, "jsd": 3}
COLUMNS = ("lse_s", "lse_t", "reverse_kl", "forward_kl", "entropy", "pick_s", "pick_t", "shift")


class Problem(Structure):
    """FastsdProblem."""

    _fields_ = [
        *((name, c_void_p) for name in ("student", "teacher", "head", "teacher_head", "bias")),
        ("target", c_void_p),
        *((name, c_int64) for name in ("rows", "width", "teacher_width", "vocabulary")),
        *((name, c_int64) for name in ("student_stride", "teacher_stride")),
        *((name, c_int64) for name in ("head_stride", "teacher_head_stride")),
        *((name, c_int32) for name in ("dtype", "keep", "threads")),
        ("scale", c_float),
        ("softcap", c_float),
        ("kept_rows", c_int64),
        ("scratch", c_void_p),
        ("borrowed", c_void_p),
        ("borrowed_rows", c_int64),
        ("borrowed_stride", c_int64),
        ("statistics", c_void_p),
    ]


class Gradient(Structure):
    """FastsdGradient."""

    _fields_ = [
        ("divergence", c_int32),
        ("beta", c_float),
        ("entry_clip", c_float),
        *((name, c_void_p) for name in ("everywhere", "weight", "entropy", "pull")),
        ("top_k", c_int64),
        *((name, c_void_p) for name in ("top_index", "top_value", "tail", "rest")),
        ("softcap_inverse", c_float),
        *((name, c_void_p) for name in ("d_student", "d_head", "d_bias", "sum")),
        ("first", c_int32),
        ("last", c_int32),
    ]


class Linear(Structure):
    """FastsdLinear."""

    _fields_ = [
        *((name, c_void_p) for name in ("packed", "x", "bias", "y")),
        *((name, c_int64) for name in ("m", "n", "k", "x_stride", "y_stride")),
        *((name, c_int32) for name in ("dtype", "out_dtype", "threads")),
    ]


class Decode(Structure):
    """FastsdDecode."""

    _fields_ = [
        *((name, c_void_p) for name in ("query", "key", "value", "out")),
        *((f"{name}_stride", c_int64) for name in ("query", "key", "value", "out")),
        *((name, c_int64) for name in ("rows", "heads", "kv_heads", "head_dim", "groups")),
        *((name, c_void_p) for name in ("group_start", "prefix", "prefix_length")),
        *((name, c_void_p) for name in ("branches", "slot", "length")),
        *((name, c_int64) for name in ("layer", "slots", "capacity")),
        *((name, c_int32) for name in ("dtype", "threads")),
        ("scale", c_float),
    ]


class Prefix(Structure):
    """FastsdPrefix."""

    _fields_ = [
        *((name, c_void_p) for name in ("key", "value")),
        *((name, c_int64) for name in ("key_head_stride", "key_stride")),
        *((name, c_int64) for name in ("value_head_stride", "value_stride")),
        *((name, c_int64) for name in ("kv_heads", "head_dim", "positions")),
        ("out", c_void_p),
        *((name, c_int32) for name in ("dtype", "threads")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built."""
    folder = Path(__file__).parent
    found = [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    found = [path for path in found if path.exists()]
    if not found:
        return None
    lib = ctypes.CDLL(str(found[0]))
    lib.fastsd_isa.restype = ctypes.c_char_p
    lib.fastsd_scratch_bytes.restype = c_int64
    lib.fastsd_scratch_bytes.argtypes = (c_int32, c_int64, c_int64, c_int64)
    lib.fastsd_borrowed_rows.restype = lib.fastsd_panel.restype = c_int64
    lib.fastsd_borrowed_rows.argtypes = (c_int32, c_int64)
    lib.fastsd_large_pages.argtypes = (c_void_p, c_int64)
    lib.fastsd_large_pages.restype = None
    lib.fastsd_statistics.argtypes = (POINTER(Problem),)
    lib.fastsd_divergence_sums.argtypes = (POINTER(Problem), POINTER(Gradient), c_void_p)
    lib.fastsd_top.argtypes = (POINTER(Problem), c_int64, c_void_p, c_void_p, c_void_p)
    lib.fastsd_gradient.argtypes = (POINTER(Problem), POINTER(Gradient))
    lib.fastsd_packed_bytes.restype = lib.fastsd_decode_bytes.restype = c_int64
    lib.fastsd_packed_bytes.argtypes = (c_int32, c_int64, c_int64)
    lib.fastsd_pack.argtypes = (c_int32, c_void_p, *[c_int64] * 3, c_void_p, c_int32)
    lib.fastsd_linear.argtypes = (POINTER(Linear),)
    lib.fastsd_decode_bytes.argtypes = (c_int32, c_int64, c_int64, c_int64)
    lib.fastsd_decode_pack.argtypes = (POINTER(Prefix),)
    lib.fastsd_decode.argtypes = (POINTER(Decode),)
    return lib


@cache
def instruction_set() -> str:
    """avx512_bf16, avx512, avx2 or scalar; "" where none can run (see `missing`)."""
    lib = library()
    return "" if lib is None else lib.fastsd_isa().decode()


def missing(instead: str = "use impl='chunked'") -> str | None:
    """Why the library cannot run here, and what to do; None if it can."""
    if library() is None:
        return (
            "the C++ library is not built: install g++ and install the package again "
            f"(pip install --force-reinstall --no-deps), or {instead}"
        )
    if not instruction_set():
        return (
            f"FASTSD_CPU_ISA={os.environ.get('FASTSD_CPU_ISA')!r} names no instruction set that "
            "this processor runs; expected avx512_bf16, avx512, avx2 or scalar, or unset it"
        )
    return None


def scratch_bytes(keep: int, kept: int, borrowed: int, vocabulary: int) -> int:
    """Bytes that `kept` rows need when the first `borrowed` lie in d head."""
    return _loaded().fastsd_scratch_bytes(keep, kept, borrowed, vocabulary)


def borrowed_rows(keep: int, row_bytes: int) -> int:
    """How many rows' slots fit in d head, a row of which has `row_bytes`."""
    return _loaded().fastsd_borrowed_rows(keep, row_bytes)


def packed_bytes(dtype: torch.dtype, n: int, k: int) -> int:
    """Bytes of a packed weight [n, k]."""
    return _loaded().fastsd_packed_bytes(DTYPES[dtype], n, k)


def decode_bytes(dtype: torch.dtype, kv_heads: int, head_dim: int, positions: int) -> int:
    """Bytes of one layer of a prefix or of a branch with room for `positions`."""
    return _loaded().fastsd_decode_bytes(DTYPES[dtype], kv_heads, head_dim, positions)


def panel() -> int:
    """Vocabulary columns of one panel."""
    return _loaded().fastsd_panel()


def empty(like: Tensor, count: int | None = None) -> Tensor:
    """torch.empty_like(like), or `count` of its dtype, on large pages where the system has them.

    Faulting fresh memory in by 4 KB pages costs a quarter of a whole call.
    """
    fresh = torch.empty_like(like) if count is None else like.new_empty(count)
    _loaded().fastsd_large_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def aligned(count: int) -> Tensor:
    """`count` bytes, uninitialised, 64-byte aligned, on large pages where the system has them."""
    room = empty(torch.empty(0, dtype=torch.uint8), count + 64)
    return room[-room.data_ptr() % 64 :]


def problem(**values) -> Problem:
    """A Problem; tensors become pointers and are kept alive with it."""
    return _filled(Problem, values)


def gradient(**values) -> Gradient:
    return _filled(Gradient, values)


def _filled(kind, values: dict):
    filled = kind()
    filled.tensors = [value for value in values.values() if isinstance(value, Tensor)]
    for name, value in values.items():
        setattr(filled, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return filled


def call(name: str, *args) -> None:
    """Calls fastsd_<name> on structs, tensors and ints; MemoryError where it found no memory."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in args]
    plain = [byref(x) if isinstance(x, Structure) else x for x in plain]
    check(function(name)(*plain), name)


def function(name: str) -> Callable[..., int]:
    """fastsd_<name>; its result goes to `check`."""
    return getattr(_loaded(), f"fastsd_{name}")


def check(code: int, name: str) -> None:
    """What fastsd_<name> returned: MemoryError for 1, RuntimeError for other errors."""
    if code == 1:
        raise MemoryError(f"native library: out of memory in fastsd_{name}")
    if code != 0:
        raise RuntimeError(f"native library: fastsd_{name} refused its arguments ({code})")


def _loaded() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError(str(missing()))
    return loaded
