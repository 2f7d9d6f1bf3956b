"""Processes that do what must not be done in this one: started late, asked by lines, replaced.

A worker is a Python program run by file name. It writes "ready" when it is, and then one line for
each line of JSON that it reads. A worker that dies, or lets its caller's patience run out, is
killed and replaced; the request's answer is then None.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError

# Of reward.timeout_s, what a worker's child gets before SIGKILL.
CHILD_SHARE = 0.9
_WORKERS = 2
_START_S = 120.0


class WorkerPool:
    """Two processes of one program, started at the first request and kept; they end at exit."""

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self._script, self._arguments, self._environment = script, arguments, environment
        self._threads: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def map(self, requests: Sequence[Any], patience_s: float) -> list[str | None]:
        """The line that answers each request, in order; None where its worker died or was killed
        after patience_s. Raises FastsdError where a worker cannot start."""
        threads = self._started()
        return list(threads.map(lambda request: self._ask(request, patience_s), requests))

    def close(self) -> None:
        """End the workers. Called at exit; a later request starts them again."""
        if self._threads is None:
            return
        self._threads.shutdown()
        self._threads = None
        while not self._idle.empty():
            self._idle.get().kill()

    def _started(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_WORKERS)
            for _ in range(_WORKERS):
                self._idle.put(self._new_worker())
            atexit.register(self.close)
        return self._threads

    def _new_worker(self) -> _Worker:
        return _Worker(self._script, self._arguments, self._environment)

    def _ask(self, request: Any, patience_s: float) -> str | None:
        worker = self._idle.get()
        try:
            line = worker.ask(request, patience_s)
            if line is None:
                # The process died, e.g. by the kernel's out-of-memory killer, or is wedged.
                worker.kill()
                worker = self._new_worker()
            return line
        finally:
            self._idle.put(worker)


def _with_fastsd(environment: Mapping[str, str] | None) -> dict[str, str]:
    """An environment in which a worker imports the fastsd that started it."""
    given = dict(os.environ if environment is None else environment)
    roots = str(Path(__file__).parents[2]), given.get("PYTHONPATH")
    return given | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}


class _Worker:
    """One process. `ask` is called by one thread at a time."""

    def __init__(
        self, script: Path, arguments: Sequence[str], environment: Mapping[str, str] | None
    ):
        self._name = script.stem
        self._started = False
        # -P: the script's folder must not be searched for modules, our types.py is not Python's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_with_fastsd(environment),
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def ask(self, request: Any, patience_s: float) -> str | None:
        """The process's line for a request; None when it is gone, or silent for patience_s."""
        if not self._started and self._line(_START_S) != "ready":
            self.kill()
            raise FastsdError(f"{self._name} did not start; its own error message is above")
        self._started = True
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            return None
        return self._line(patience_s)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stdout.close()

    def _line(self, patience_s: float) -> str | None:
        ready, _, _ = select.select([self._stdout], [], [], patience_s)
        return self._stdout.readline().decode().strip() or None if ready else None
