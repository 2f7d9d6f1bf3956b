"""Small C programs that say what csrc/fastsd_native.h declares."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from places import ROOT

HEADER = ROOT / "csrc" / "fastsd_native.h"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def printed(folder: Path, lines: list[str]) -> dict[str, list[int]]:
    """What a C program with these lines prints: names and numbers."""
    source = folder / "probe.cpp"
    includes = f'#include "{HEADER}"\n#include <cstddef>\n#include <cstdio>\n'
    source.write_text(f"{includes}int main() {{ {' '.join(lines)} }}\n")
    output("g++", source, "-o", folder / "probe")
    words = [line.split() for line in output(folder / "probe").splitlines()]
    return {name: [int(x) for x in values] for name, *values in words}
