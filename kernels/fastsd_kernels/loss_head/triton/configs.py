"""Launch configurations of the Triton kernels, by architecture; how a kernel is compiled ahead.

A table and no autotuning: nothing is timed at import, results do not depend on what a timer saw,
and every entry is compiled ahead of time in the tests for its architecture and must not spill.
Configurations never depend on the number of rows, so that a row's result does not either.
Needs neither triton nor a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Capability = tuple[int, int] | None


@dataclass(frozen=True)
class AotCase:
    """One kernel with representative arguments, as `tests/helpers/aot.py` compiles it.

    A kernel module exposes `aot_cases(capability) -> list[AotCase]`; the configuration of that
    architecture is already in `constexprs` and `num_warps`.

    name: unique within the module, e.g. "gradient bf16 V151936".
    kernel: the @triton.jit function.
    signature: every parameter in order -> Triton type: "*bf16", "*fp32", "*i64", "i32", "fp32",
        "tensordesc<bf16[128,64]>" or "constexpr".
    constexprs: values of the parameters that are "constexpr" (also of those that are None).
    divisible: names of pointers and integers that the launcher would find divisible by 16.
    representative: compiled by the fast tests; the others by the slow ones.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 2
    representative: bool = True
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": False})


@dataclass(frozen=True)
class TileConfig:
    """BLOCK_T rows of both streams against BLOCK_V head rows, BLOCK_D of the hidden size a step.

    PIECES: the tile of products is folded into the sums in so many parts, so that the epilogue
    needs registers for one part at a time beside the accumulators.
    """

    BLOCK_T: int
    BLOCK_V: int
    BLOCK_D: int
    PIECES: int
    num_warps: int
    num_stages: int
    TMA: bool = False

    def __str__(self) -> str:
        tile = f"{self.BLOCK_T}x{self.BLOCK_V}x{self.BLOCK_D}/{self.PIECES}"
        return f"{tile} warps {self.num_warps} stages {self.num_stages}"


# Vocabulary columns of a split: a multiple of every BLOCK_V, the same for all architectures.
SPLIT_COLUMNS = 4096

# The tile kernel by dtype, access and streams. Access is how tiles are read: "tma" descriptors,
# "pointers" with 16-byte loads, "scalar" loads of widths that are not a multiple of 16. fp32 is
# IEEE fp32 on the plain cores. An architecture takes from "default" what it does not list.
_TILES: dict[str, dict[tuple[str, str, int], TileConfig]] = {
    "default": {
        ("16-bit", "pointers", 2): TileConfig(64, 64, 64, 2, 8, 3),
        ("16-bit", "pointers", 1): TileConfig(128, 128, 32, 4, 8, 4),
        ("16-bit", "scalar", 2): TileConfig(64, 64, 16, 2, 8, 2),
        ("16-bit", "scalar", 1): TileConfig(64, 64, 16, 2, 8, 2),
        ("fp32", "pointers", 2): TileConfig(64, 64, 16, 1, 8, 2),
        ("fp32", "pointers", 1): TileConfig(64, 64, 16, 1, 8, 2),
        ("fp32", "scalar", 2): TileConfig(32, 32, 16, 2, 8, 2),
        ("fp32", "scalar", 1): TileConfig(32, 32, 16, 2, 8, 2),
    },
    "sm_80": {("16-bit", "pointers", 2): TileConfig(64, 128, 32, 4, 8, 4)},
    "sm_90": {
        ("16-bit", "tma", 2): TileConfig(128, 128, 64, 2, 8, 3, TMA=True),
        ("16-bit", "tma", 1): TileConfig(128, 256, 64, 4, 8, 3, TMA=True),
        ("16-bit", "pointers", 2): TileConfig(128, 128, 64, 4, 8, 3),
        ("16-bit", "pointers", 1): TileConfig(128, 128, 64, 2, 8, 3),
    },
    "sm_100": {
        ("16-bit", "tma", 2): TileConfig(128, 128, 64, 2, 8, 3, TMA=True),
        ("16-bit", "tma", 1): TileConfig(128, 256, 64, 4, 8, 3, TMA=True),
        ("16-bit", "pointers", 2): TileConfig(128, 128, 64, 4, 8, 3),
        ("16-bit", "pointers", 1): TileConfig(128, 128, 64, 4, 8, 3),
    },
}

# Row kernels: columns per step and warps, by kernel name; "*" is any kernel not named. One 16-byte
# load a thread: twice the columns spill 8 bytes in the jsd gradient (sm_80) and row sums (sm_100).
_ROWS: dict[str, dict[str, dict[str, int]]] = {
    "default": {"*": {"BLOCK": 1024, "num_warps": 8}},
}


def architecture(capability: Capability) -> str:
    """The table's key for what torch.cuda.get_device_capability says; None: no device.

    Only datacentre parts have a key: sm_86, sm_89 and sm_120 hold 100 KB of shared memory, not
    163 to 228, so they take "default". torch reports AMD's gfx942 as (9, 4), which no NVIDIA part
    is.
    """
    known = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    known[(9, 4)] = "gfx942"
    return "default" if capability is None else known.get(capability, "default")


def row_config(capability: Capability, kernel: str) -> dict[str, int]:
    """BLOCK (columns per step, a power of two) and num_warps of a row kernel."""
    table = _ROWS.get(architecture(capability), _ROWS["default"])
    return dict(table.get(kernel, table["*"]))


def tile_config(
    capability: Capability, dtype: torch.dtype, accesses: Sequence[str], streams: int
) -> TileConfig:
    """The tile kernel's configuration for 1 or 2 streams of bf16, fp16 or fp32.

    accesses: the ways in which the matrices can be read, best first and the last one "pointers" or
    "scalar", which every table has. The first one that the table has is taken.
    """
    table = _TILES["default"] | _TILES.get(architecture(capability), {})
    kind = "fp32" if dtype == torch.float32 else "16-bit"
    keys = [(kind, access, streams) for access in accesses]
    return next(table[key] for key in keys if key in table)
