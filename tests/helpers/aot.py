"""Triton kernels compiled with no GPU: ptxas resources and the tensor instructions in the PTX.

`n_regs` and `n_spills` of a compiled kernel need a driver, so ptxas -v is run on the PTX, with the
binary that Triton itself takes for the architecture. Only for processes without TRITON_INTERPRET.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import fastsd_kernels.loss_head.triton
from fastsd_kernels.loss_head.triton.configs import AotCase, Capability

FOLDER = Path(fastsd_kernels.loss_head.triton.__file__).parent
# Shared memory that one block may take, in bytes.
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448}
SHARED_LIMIT |= {"sm_120": 101_376, "gfx942": 65_536}
_INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "cp.async": r"\bcp\.async\.c[ag]",
    "ld.v4": r"\bld\.global\S*\.v4",
    "mfma": r"\bv_mfma",
}


@dataclass(frozen=True)
class Resources:
    """What the assembler says of one kernel, per thread but for `shared_bytes`; instructions."""

    case: AotCase
    architecture: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    instructions: dict[str, int]

    def __str__(self) -> str:
        found = " ".join(f"{name} {count}" for name, count in self.instructions.items() if count)
        return (
            f"{self.architecture:6} registers {self.registers:3} stack {self.stack_bytes:4} "
            f"spills {self.spills:4} shared {self.shared_bytes:6}  {self.case.name}  [{found}]"
        )


def capability(architecture: str) -> Capability:
    """What torch reports on that architecture."""
    if architecture == "gfx942":
        return (9, 4)
    number = int(architecture.removeprefix("sm_"))
    return number // 10, number % 10


def kernel_modules() -> list[str]:
    """The modules with kernels, and those that say how they are launched."""
    stems = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"]
    return [f"{fastsd_kernels.loss_head.triton.__name__}.{stem}" for stem in stems]


def cases(architecture: str) -> list[AotCase]:
    """All cases; a vocabulary is compiled both as any number and as a multiple of 16."""
    found = []
    for name in kernel_modules():
        module = import_module(name)
        if hasattr(module, "aot_cases"):
            found += module.aot_cases(capability(architecture))
    found += [
        replace(case, name=f"{case.name} V%16=0", divisible=(*case.divisible, "vocabulary"))
        for case in found
        if case.signature.get("vocabulary") == "i32" and "vocabulary" not in case.divisible
    ]
    assert len({case.name for case in found}) == len(found), "names of cases repeat"
    return found


def kernels() -> set[str]:
    """Names of all entry points: jitted functions called `..._kernel`."""
    return {
        name
        for module in kernel_modules()
        for name, _ in inspect.getmembers(
            import_module(module), lambda x: isinstance(x, triton.JITFunction)
        )
        if name.endswith("_kernel")
    }


def compile_all(
    architecture: str, wanted: Callable[[AotCase], bool] = lambda case: True
) -> list[Resources]:
    """Resources of all wanted cases, compiled by as many processes as there are cores."""
    indices = [i for i, case in enumerate(cases(architecture)) if wanted(case)]
    # Forked, so that kernels are not pickled and the module path of pytest carries over.
    with ProcessPoolExecutor(cpu_count(), get_context("fork")) as pool:
        found = list(pool.map(partial(_compile_index, architecture), indices, chunksize=4))
    return [
        Resources(cases(architecture)[i], *values) for i, values in zip(indices, found, strict=True)
    ]


def _compile_index(architecture: str, index: int) -> tuple:
    found = vars(compile_case(cases(architecture)[index], architecture))
    return tuple(value for name, value in found.items() if name != "case")


def compile_case(case: AotCase, architecture: str) -> Resources:
    """Divisible arguments are marked as the launcher would mark them."""
    names = list(case.signature)
    assert names == case.kernel.arg_names, f"{case.name}: signature of {case.kernel.__name__}"
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, case.signature, case.constexprs, divisible)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages} | case.options
    amd = architecture.startswith("gfx")
    target = (
        GPUTarget("hip", architecture, 64)
        if amd
        else GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    )
    compiled = triton.compile(source, target=target, options=options)
    text = compiled.asm["amdgcn" if amd else "ptx"]
    registers, stack, spills = _of_amdgcn(text) if amd else _of_ptx(text, target.arch)
    instructions = {name: len(re.findall(x, text)) for name, x in _INSTRUCTIONS.items()}
    shared = compiled.metadata.shared
    return Resources(case, architecture, registers, stack, spills, shared, instructions)


def _of_ptx(ptx: str, number: int) -> tuple[int, int, int]:
    """Registers, stack bytes and spilled bytes, by ptxas -v."""
    gpu = f"sm_{number}{'a' if number >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [get_ptxas(number).path, "-v", f"--gpu-name={gpu}", str(source), "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    log = done.stderr + done.stdout
    return (
        max(_integers(r"Used (\d+) registers", log)),
        sum(_integers(r"(\d+) bytes stack frame", log)),
        sum(_integers(r"(\d+) bytes spill", log)),
    )


def _of_amdgcn(text: str) -> tuple[int, int, int]:
    """Vector registers, stack bytes and spilled registers, from the kernel's metadata."""
    spills = _integers(r"\.[vs]gpr_spill_count: *(\d+)", text)
    return (
        max(_integers(r"\.vgpr_count: *(\d+)", text)),
        sum(_integers(r"\.private_segment_fixed_size: *(\d+)", text)),
        sum(spills),
    )


def _integers(pattern: str, text: str) -> Iterable[int]:
    found = [int(x) for x in re.findall(pattern, text)]
    assert found, f"the assembler printed nothing like {pattern!r}"
    return found
