"""The C++ loss head under AddressSanitizer, UBSan and ThreadSanitizer, over random shapes.

native_fuzz.cpp is the driver. Each build is also shown to fail: on buffers one element short, and
on two threads that share their results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastsd_kernels.native_library import instruction_set

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "csrc").glob("*.cpp")), Path(__file__).with_name("native_fuzz.cpp")]
SETS = ("avx512_bf16", "avx512", "avx2", "scalar")
CASES = 10_000
# Buffers that the library itself reads or writes to the last element.
SHORT = ("student", "teacher", "head", "statistics", "scratch", "sums", "logits", "log_rest",
         "index", "d_student", "d_head", "sum")  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


def build(folder: Path, *flags: str) -> Path:
    """-O1: sanitizers need no more, and it compiles in a third of the time."""

    def compiled(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        command = ["g++", "-std=c++17", "-O1", "-g", "-Wno-psabi", *flags]
        subprocess.run([*command, f"-I{ROOT / 'csrc'}", "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    subprocess.run(["g++", *flags, *objects, "-o", folder / "fuzz", "-pthread"], check=True)
    return folder / "fuzz"


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Path:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    return build(tmp_path_factory.mktemp("address"), *flags)


@pytest.fixture(scope="module")
def thread(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("thread"), "-fsanitize=thread", "-DFASTSD_STD_THREADS")


def fuzz(program: Path, isa: str, *words: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "FASTSD_CPU_ISA": isa}
    return subprocess.run([program, *words], env=env, capture_output=True, text=True)


def clean(program: Path, isa: str, seed: int, cases: int) -> None:
    found = fuzz(program, isa, str(seed), str(cases))
    if found.returncode == 2 and "no such instruction set" in found.stderr:
        pytest.skip(f"the processor does not run {isa}")
    assert found.stderr == "" and found.returncode == 0, found.stdout[-2000:] + found.stderr[:4000]
    assert found.stdout == f"{cases} cases with {isa}, 0 failures\n"


@pytest.mark.parametrize("isa", SETS)
def test_addresses_and_undefined_behaviour(address, isa):
    clean(address, isa, 1, CASES)


@pytest.mark.parametrize("buffer", SHORT)
def test_a_buffer_one_element_short_is_caught(address, buffer):
    for isa in {instruction_set(), "scalar"}:
        found = fuzz(address, isa, "1", "2000", buffer)
        assert found.returncode != 0 and "ERROR: AddressSanitizer" in found.stderr, isa
        assert "csrc/" in found.stderr  # the library's own access, not the driver's


@pytest.mark.parametrize("isa", SETS)
def test_data_races(thread, isa):
    clean(thread, isa, 2, CASES // 4)


def test_a_data_race_is_caught(thread):
    found = fuzz(thread, "scalar", "2", "50", "race")
    assert found.returncode != 0 and "data race" in found.stderr
