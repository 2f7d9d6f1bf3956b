"""One timer, one memory meter, one writer of results: what every bench script measures with.

Contestants take turns within each round, so a machine that slows down slows all of them, and each
is reported by the median of its rounds with the extremes beside it. On a CPU the clock is process
CPU time (other processes stretch wall time, which is reported too); on CUDA it is device time
between two events. Warming up is the caller's first call, never a round.

Memory on a CPU is the rise of the resident set: before the call the allocator gives its free pages
back and the kernel's high-water mark is reset. Between calls freed memory is kept, as in training
(see the Makefile), so that no contestant pays page faults for buffers it had the round before.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds over the rounds: the clock's median, minimum and maximum, and the wall's median."""

    seconds: float
    least: float
    most: float
    wall: float
    rounds: int


def time_once(run: Run, device: torch.device) -> tuple[float, float]:
    """(seconds on the device's clock, wall seconds) of one call; its result is dropped inside."""
    if device.type == "cuda":
        return _time_on_cuda(run, device)
    start, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - start, time.perf_counter() - wall


def _time_on_cuda(run: Run, device: torch.device) -> tuple[float, float]:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        wall = time.perf_counter()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000, time.perf_counter() - wall


def interleave(
    runs: Mapping[str, Run], rounds: Mapping[str, int], device: torch.device
) -> dict[str, Timing]:
    """Times `runs`, already warm, in turns: in round r each one that has more than r rounds."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for r in range(max(rounds.values(), default=0)):
        for name, run in runs.items():
            if r < rounds[name]:
                samples[name].append(time_once(run, device))
    return {name: _summary(found) for name, found in samples.items() if found}


def _summary(samples: list[tuple[float, float]]) -> Timing:
    clock, wall = zip(*samples, strict=True)
    return Timing(
        statistics.median(clock), min(clock), max(clock), statistics.median(wall), len(clock)
    )


def rounds_for(seconds: float, most: int) -> int:
    """Rounds of a contestant whose warm-up took `seconds`: `most`, 3 above 1 s, 1 above 5 s."""
    return most if seconds <= 1 else min(most, 3) if seconds <= 5 else 1


# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8


def keep_freed_memory(keep: bool) -> bool:
    """Whether freed buffers stay with the process (True) or go back at once (False).

    Returns False where the C library is not glibc: then nothing was changed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return False
    libc.mallopt(_ARENA_MAX, 1)
    libc.mallopt(_MMAP_MAX, 0 if keep else 65536)
    libc.mallopt(_MMAP_THRESHOLD, 128 << 10)
    libc.mallopt(_TRIM_THRESHOLD, -1 if keep else 128 << 10)
    if not keep:
        libc.malloc_trim(0)
    return True


def peak_memory(run: Run, device: torch.device) -> tuple[int | None, Any]:
    """(bytes by which memory in use rose at most during one call, what the call returned).

    On CUDA: the caching allocator's `max_memory_allocated`. On a CPU: the resident set, to about
    1 MiB; None where the system has no /proc/self/clear_refs or no glibc.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    reset = Path("/proc/self/clear_refs")
    if not reset.exists() or not keep_freed_memory(False):
        return None, run()
    try:
        reset.write_text("5")  # 5: only the high-water mark
        before = _status("VmRSS")
        result = run()
        return _status("VmHWM") - before, result
    finally:
        keep_freed_memory(True)


def hold_pages(size: int, device: torch.device) -> None:
    """After the meter gave memory back: lets the process own `size` bytes of free memory again, so
    that the first round does not pay for the page faults. Nothing to do on CUDA."""
    if device.type == "cpu" and keep_freed_memory(True):
        torch.ones(size, dtype=torch.uint8)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def linear_fit(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """(intercept, slope, R^2) of the least-squares line."""
    line = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    left = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    total = sum((y - mean) ** 2 for y in ys)
    return line.intercept, line.slope, 1 - left / total if total else 1.0


def record(
    script: str, device: torch.device, rows: list[dict], arguments: list[str], **facts: Any
) -> dict:
    """The results of a run with all that is needed to run it again, ready for JSON."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "script": script,
        "arguments": arguments,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "python": platform.python_version(),
        "versions": versions,
        **facts,
        "rows": rows,
    }


def write(found: dict, path: Path | None) -> None:
    """Prints the record as one line, the last of a script's output, and saves it if asked to."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), flush=True)


def timing_fields(timing: Timing | None) -> dict:
    """A Timing as columns of a row; nothing where there is none."""
    return {} if timing is None else asdict(timing)


def commit() -> str:
    """Short hash of the checkout, "-dirty" with uncommitted changes, "unknown" outside of git."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=7",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def hardware(device: torch.device) -> str:
    """The GPU's name and memory, or the processor's name, cores and the flags that matter here."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    """Model name, family and model number: virtual machines often give the first without detail."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    name = found.get("model name", platform.machine())
    numbers = [f"{x} {found[x]}" for x in ("cpu family", "model") if x in found]
    bf16 = ["avx512_bf16"] if "avx512_bf16" in found.get("flags", "") else []
    return " ".join([name, *([f"({', '.join(numbers)})"] if numbers else []), *bf16])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
