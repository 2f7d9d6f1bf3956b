"""The C++ library under AddressSanitizer, UBSan and ThreadSanitizer, over random shapes.

native_fuzz.cpp drives the loss head, native_fuzz_decoding.cpp the packed linear layer and decode
attention, native_fuzz_tree.cpp tree attention and the draw. Each build is also shown to fail: on
buffers one element short, and on two threads that share their results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from places import ROOT

from fastsd_kernels.native_library import instruction_set

SOURCES = sorted((ROOT / "csrc").glob("*.cpp"))
DRIVERS = {
    name: Path(__file__).with_name(f"{name}.cpp")
    for name in ("native_fuzz", "native_fuzz_decoding", "native_fuzz_tree")
}
SETS = ("avx512_bf16", "avx512", "avx2", "scalar")
CASES = 10_000
# Buffers that the library itself reads or writes to the last element.
SHORT = {
    "native_fuzz": ("student", "teacher", "head", "statistics", "scratch", "sums", "logits",
                    "log_rest", "index", "d_student", "d_head", "sum"),
    "native_fuzz_decoding": ("weight", "packed", "x", "y", "bias", "query", "key", "value", "out",
                             "branches", "prefix_memory", "prefix_key", "prefix_value", "prefix",
                             "prefix_length", "group_start", "slot", "length"),
    "native_fuzz_tree": ("query", "key", "value", "prefix_key", "prefix_value", "grad", "out",
                         "lse", "lengths", "parents", "d_query", "d_key", "d_value",
                         "d_prefix_key", "d_prefix_value", "logits", "uniform", "token",
                         "logprob"),
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


def build(folder: Path, *flags: str) -> Path:
    """The folder with both programs. -O1: sanitizers need no more, and it compiles in a third of
    the time."""

    def compiled(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        command = ["g++", "-std=c++17", "-O1", "-g", "-Wno-psabi", *flags]
        subprocess.run([*command, f"-I{ROOT / 'csrc'}", "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        library = list(pool.map(compiled, SOURCES))
        drivers = dict(zip(DRIVERS, pool.map(compiled, DRIVERS.values()), strict=True))
    for name, driver in drivers.items():
        command = ["g++", *flags, *library, driver, "-o", folder / name, "-pthread"]
        subprocess.run(command, check=True)
    return folder


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
@pytest.mark.parametrize("driver", DRIVERS)
def test_addresses_and_undefined_behaviour(address, driver, isa):
    clean(address / driver, isa, 1, CASES)


@pytest.mark.parametrize(
    "driver, buffer", [(driver, buffer) for driver in SHORT for buffer in SHORT[driver]]
)
def test_a_buffer_one_element_short_is_caught(address, driver, buffer):
    for isa in {instruction_set(), "scalar"}:
        found = fuzz(address / driver, isa, "1", "2000", buffer)
        assert found.returncode != 0 and "ERROR: AddressSanitizer" in found.stderr, isa
        assert "csrc/" in found.stderr  # the library's own access, not the driver's


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_data_races(thread, driver, isa):
    clean(thread / driver, isa, 2, CASES // 4)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_data_race_is_caught(thread, driver):
    found = fuzz(thread / driver, "scalar", "2", "50", "race")
    assert found.returncode != 0 and "data race" in found.stderr
