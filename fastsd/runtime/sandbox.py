"""Answers judged in a child that can do nothing but compute, and is killed in time.

`check` forks the child of a worker process (fastsd/rewards/math_worker.py, fastsd/tasks/
gym_worker.py). An audit hook in it refuses any compilation of text, any process, connection or file
written, whatever the libraries may do; limits bound memory, processor time, processes and bytes
written.

This keeps answers from being executed; it is no jail for code that runs. Native code, and Python
code that gets round an audit hook, could read what this user may read. Put the trainer in a
container where that matters.
"""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import sys
from collections.abc import Callable

MEMORY_BYTES = 2 << 30
_REFUSED = ("ctypes.", "pty.", "shutil.", "socket.", "subprocess.") + tuple(
    f"os.{call}"
    for call in "chmod exec fork kill link mkdir posix_spawn putenv remove rename rmdir symlink "
    "system truncate".split()
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def refuse_effects(event: str, arguments: tuple) -> None:
    """Audit hook: answers get no processes, no network and no files to write."""
    writes = event == "open" and arguments[2] & _WRITING
    if writes or event.startswith(_REFUSED):
        raise PermissionError(f"{event} is not allowed while an answer is checked")


def refuse(event: str, arguments: tuple) -> None:
    """Audit hook: no effects, and no code made of text."""
    refuse_effects(event, arguments)
    # Importing a module compiles under the file's own name; eval and exec under "<string>".
    if event == "compile" and str(arguments[1]).startswith("<"):
        raise PermissionError("compiling text is not allowed while an answer is checked")


def _limit(timeout_s: float) -> None:
    """Bound what one child can take: memory, processor time, processes, bytes written to a file.

    The time bound only matters where the process that would kill the child is gone.
    """
    seconds = math.ceil(timeout_s) + 1
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))


def check(judge: Callable[[], bool], timeout_s: float, hook: Callable = refuse) -> str:
    """What `judge` says, called in a child under the audit hook: "right", "wrong" or "timeout".

    At most timeout_s plus a fork later. A judge that raises, dies or runs out of memory is "wrong".
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _limit(timeout_s)
            sys.addaudithook(hook)
            os.write(send, b"1" if judge() else b"0")
        finally:
            # _exit: no clean-up of the parent's buffers, and RecursionError leaves no trace.
            os._exit(0)
    os.close(send)
    ready, _, _ = select.select([receive], [], [], timeout_s)
    verdict = os.read(receive, 1) if ready else None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(receive)
    return {b"1": "right", None: "timeout"}.get(verdict, "wrong")
