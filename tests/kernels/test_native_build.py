"""The C++ library's build: exports, links, structs as ctypes has them, and no compiler at all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from c_probe import HEADER, needs_compiler, output, printed
from places import ROOT

from fastsd_kernels import fused_linear_loss, native_library
from fastsd_kernels.loss_head import implementation_choice
from fastsd_kernels.testing import loss_head_inputs


def needs(tool: str):
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"needs {tool}")


@pytest.fixture
def library() -> Path:
    loaded = native_library.library()
    assert loaded is not None, "g++ is here, so the installation must have built the library"
    return Path(loaded._name)


@needs_compiler
@needs("nm")
def test_exports_the_header_and_nothing_else(library):
    declared = set(re.findall(r"\b(fastsd_\w+)\(", re.sub(r"//.*", "", HEADER.read_text())))
    assert len(declared) >= 8
    exported = output("nm", "-D", "--defined-only", library).splitlines()
    assert {line.split()[-1] for line in exported} == declared


@needs_compiler
@needs("nm")
def test_instruction_sets_share_no_code(library):
    """A function that the linker merges over sets could run one's instructions on another's."""
    symbols = output("nm", "-C", library).splitlines()
    functions = [line for line in symbols if re.search(r" [tTwWvVu] .*\(", line)]
    own = re.compile(r"\b(avx512_bf16|avx512|avx2|scalar)::")
    assert functions and [line for line in functions if not own.search(line)] == []


@needs_compiler
@needs("readelf")
def test_links_no_torch(library):
    linked = re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-d", library))
    allowed = ("libstdc++.", "libm.", "libgomp.", "libgcc_s.", "libc.", "ld-linux", "libpthread.")
    assert linked and all(name.startswith(allowed) for name in linked), linked


@needs_compiler
def test_the_header_is_plain_c():
    flags = ["-xc", "-std=c99", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    output("g++", *flags, "-include", HEADER, "/dev/null")


@needs_compiler
def test_structs_are_those_of_the_header(tmp_path):
    structs = {"FastsdProblem": native_library.Problem, "FastsdGradient": native_library.Gradient}
    lines = []
    for name, kind in structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in kind._fields_:
            place = f"offsetof({name}, {field}), sizeof((({name}*)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
    found = printed(tmp_path, lines)
    for name, kind in structs.items():
        assert found.pop(name) == [ctypes.sizeof(kind)]
        for field, *_ in kind._fields_:
            own = getattr(kind, field)
            assert found.pop(f"{name}.{field}") == [own.offset, own.size], field
    assert not found


@needs_compiler
def test_constants_are_those_of_the_header(tmp_path):
    names = ("F32", "BF16", "NOTHING", "STUDENT", "STUDENT_GAP", "LARGER_GAP", "LOGITS")
    expected = {f"FASTSD_{name}": getattr(native_library, name) for name in names}
    kinds = {"none": "NO_DIVERGENCE", "forward_kl": "FORWARD_KL", "reverse_kl": "REVERSE_KL"}
    for name, value in native_library.DIVERGENCES.items():
        expected[f"FASTSD_{kinds.get(name, name.upper())}"] = value
    for index, column in enumerate(native_library.COLUMNS):
        expected[f"FASTSD_{column.removesuffix('_kl').upper()}"] = index
    expected["FASTSD_COLUMNS"] = len(native_library.COLUMNS)
    found = printed(tmp_path, [f'printf("{name} %d\\n", {name});' for name in expected])
    assert found == {name: [value] for name, value in expected.items()}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the build reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc", "kernels", "fastsd"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def setup(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", *words]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_without_a_compiler_the_installation_goes_on(checkout):
    found = setup(checkout, "build_ext", "--inplace", CC="/bin/false", CXX="/bin/false")
    assert found.returncode == 0, found.stderr
    assert "fastsd_kernels._native" in found.stderr  # the warning names what was left out
    assert not list(checkout.glob("kernels/fastsd_kernels/_native*"))


@pytest.mark.slow
@needs_compiler
def test_the_wheel_contains_the_library(checkout):
    found = setup(checkout, "bdist_wheel", "--dist-dir", str(checkout / "dist"))
    assert found.returncode == 0, found.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert not wheel.name.endswith("none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if re.fullmatch(r"fastsd_kernels/_native\..*so", name)]
    assert "fastsd_kernels/native_library.py" in names


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(native_library, "library", lambda: None)
    x = loss_head_inputs(3, 4, 5, torch.float32)
    reason = "the C\\+\\+ library is not built: install g\\+\\+ .* impl='chunked'"
    with pytest.raises(RuntimeError, match=f"impl='native' is not available: {reason}"):
        fused_linear_loss(**x, impl="native")
    assert fused_linear_loss(**x).impl == "chunked"
    name, why = implementation_choice("auto", "cpu", torch.bfloat16)
    assert name == "chunked" and re.fullmatch(f"native is not available: {reason}", why)
    with pytest.raises(RuntimeError, match=reason):
        native_library.scratch_bytes(native_library.LOGITS, 1, 0, 5)


def test_what_native_does_not_take():
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(RuntimeError, match="float32 and bfloat16, got .*use impl='chunked'"):
            fused_linear_loss(**loss_head_inputs(3, 4, 5, dtype), impl="native")
        assert implementation_choice("auto", "cpu", dtype)[0] == "chunked"
    with pytest.raises(RuntimeError, match="native runs on CPU tensors, got cuda"):
        implementation_choice("native", "cuda", torch.float32)
