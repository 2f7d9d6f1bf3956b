"""One contestant in one process, told what to do over a pipe, and the meters it reports with.

Processes stay alive between requests, so that contestants take turns step by step. Request and
answer are one JSON object a line; the first answer says that the contestant is loaded. All run with
the Makefile's allocator settings, which keep freed memory, and with the same number of threads.

A phase's seconds are its own: those of a phase inside another are not the outer's. CPU seconds are
the process's, summed over threads. Peak memory is the highest resident set during a request, above
that of the resting process: model and optimizer loaded, free pages given back, no work done yet.
Needs Linux with glibc.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import measure

PHASES = ("rollout", "student", "teacher", "head", "backward", "optimizer")
# Engine -> the module whose `serve(settings, channel)` runs it.
ENGINES = {
    "fastsd": "bench.train_step.fastsd",
    "trl": "bench.train_step.trl",
    "hf": "bench.train_step.hf",
    "gemm": "bench.train_step.count",
}


class ContestantFailed(Exception):
    """The process of a contestant reported an error or ended; the message says which."""


class Meter:
    """CPU and wall seconds of a request, in all and by phase."""

    def __init__(self):
        self._phases: dict[str, list[float]] = {}
        self._running: list[str] = []
        self._charged = self._started = self._now()

    def start(self) -> None:
        """A new request begins."""
        self._phases = {}
        self._charged = self._started = self._now()

    def read(self) -> dict[str, Any]:
        """cpu, wall, and phases: {name: [CPU seconds, wall seconds]}."""
        self._charge()
        cpu, wall = (b - a for a, b in zip(self._started, self._charged, strict=True))
        return {"cpu": cpu, "wall": wall, "phases": self._phases}

    @property
    def running(self) -> str | None:
        return self._running[-1] if self._running else None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Every later call of that function of `owner` is phase `name`."""
        function = getattr(owner, attribute)

        def timed(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def _charge(self) -> None:
        now = self._now()
        if self._running:
            spent = self._phases.setdefault(self._running[-1], [0.0, 0.0])
            for clock in (0, 1):
                spent[clock] += now[clock] - self._charged[clock]
        self._charged = now

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()


class Memory:
    """The resident set over that of the resting process, which is the one that makes this."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.rest = measure._status("VmRSS")

    def start(self) -> None:
        """A new request begins."""
        Path("/proc/self/clear_refs").write_text("5")  # 5: only the high-water mark

    def read(self) -> dict[str, int]:
        return {"peak_bytes": max(0, measure._status("VmHWM") - self.rest)}


class Channel:
    """The worker's end: requests from standard input, answers to what was standard output."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # libraries print

    def receive(self) -> dict[str, Any]:
        """The next request. Ends the process where there are no more."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        return json.loads(line)

    def send(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")


@dataclass
class Worker:
    """The bench's end. `settings` go to the engine: engine, folder, configuration, threads, ...

    Entering starts the process; `loaded` waits until it is ready. Raises ContestantFailed with what
    the worker said.
    """

    settings: dict[str, Any]
    log: Path

    def __enter__(self) -> Worker:
        environment = os.environ | allocator_settings() | {
            "OMP_NUM_THREADS": str(self.settings["threads"]),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.train_step.worker"], cwd=measure.ROOT,
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )  # fmt: skip
        self._write(self.settings)
        return self

    def loaded(self) -> dict[str, Any]:
        """What the contestant says of itself."""
        return self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        self._write(request)
        return self._read()

    def __exit__(self, *_) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, record: dict[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # then reading tells why
            self._process.stdin.write(json.dumps(record) + "\n")
            self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise ContestantFailed(answer["error"])
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        said = self.log.read_text().strip().splitlines()[-1:]
        return f"the process ended with status {status}: {''.join(said)}"


def allocator_settings() -> dict[str, str]:
    """The environment that the Makefile trains in."""
    text = (measure.ROOT / "Makefile").read_text().replace("\\\n", " ")
    [line] = re.findall(r"^malloc := (.*)$", text, re.MULTILINE)
    return dict(setting.split("=") for setting in line.split())


def serve(requests: Callable[[dict[str, Any]], dict[str, Any]], channel: Channel) -> None:
    """Answers until there are no more requests."""
    while True:
        channel.send(requests(channel.receive()))


def main() -> None:
    channel = Channel()
    settings = channel.receive()
    try:
        import torch

        torch.set_num_threads(settings["threads"])
        importlib.import_module(ENGINES[settings["engine"]]).run(settings, channel)
    except Exception as error:
        channel.send({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
        raise


if __name__ == "__main__":
    main()
