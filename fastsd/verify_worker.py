"""A process that compares mathematical answers; fastsd.verify starts it by file name.

Run as `python -P verify_worker.py TIMEOUT_S`; it imports math-verify but neither fastsd nor torch.
Lines on stdin are JSON {"gold": str, "answer": str}; for each, one line on stdout: "right",
"wrong" or "timeout". After "ready" the process itself never touches answer text: it forks a child
per answer from its warm state and kills it with SIGKILL when the time is up. So no answer can
wedge, bloat or poison the process, and a replacement costs a fork instead of an import of sympy.

Answers are only parsed as LaTeX (an ANTLR grammar that builds sympy nodes). Two ways from text to
Python's `eval` had to be closed: math-verify's `ExprExtractionConfig` calls sympy's `parse_expr`
and is not used; the LaTeX parser calls `sympy.Number(text)`, which ends in `parse_expr` as well,
so numbers are converted here. An audit hook in the child then refuses any compilation of text, any
process, connection or file written, whatever the libraries may do; limits bound memory, processor
time, processes and bytes written. `check` is that child, and other workers use it too
(fastsd/tasks/gym_worker.py).

This keeps answers from being executed; it is no jail for code that runs. Native code, and Python
code that gets round an audit hook, could read what this user may read. Put the trainer in a
container where that matters.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 2 << 30
_REFUSED = ("ctypes.", "pty.", "shutil.", "socket.", "subprocess.") + tuple(
    f"os.{call}"
    for call in "chmod exec fork kill link mkdir posix_spawn putenv remove rename rmdir symlink "
    "system truncate".split()
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Between them these import what sympy imports late, and fill the ANTLR parser's caches.
_WARM_UP = [
    ("42", "42.0"),
    (r"\frac{1}{2}", "-0.5"),
    (r"x=\sqrt{2}", r"\sin(\pi/6)"),
    ("(1, 2]", r"1 < x \le 2"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\int_0^1 x^2 dx", r"\sum_{k=1}^{4} k"),
    (r"\log_2 8", r"\binom{5}{2}"),
    ("3+4i", r"e^{i\pi}"),
    (r"50\%", "1,000"),
]


def _as_latex(text: str) -> str:
    """math-verify looks for LaTeX between delimiters; put them around what has none."""
    return text if any(mark in text for mark in ("$", r"\(", r"\[", r"\boxed")) else f"${text}$"


def equivalent(gold: str, answer: str) -> bool:
    """Whether math-verify finds the answer equal to the gold answer. May take for ever."""
    from math_verify import LatexExtractionConfig, parse, verify

    # no_fallback: otherwise unparsed text is compared piece by piece, and "42 or 43" is right.
    options: dict[str, Any] = {
        "extraction_config": [LatexExtractionConfig()],
        "fallback_mode": "no_fallback",
        "parsing_timeout": None,
    }
    parsed_gold, parsed_answer = (parse(_as_latex(text), **options) for text in (gold, answer))
    return verify(parsed_gold, parsed_answer, timeout_seconds=None) is True


def close_sympys_eval() -> None:
    """Make `sympy.Number(text)` convert text as a number, which it does by `eval` otherwise."""
    from sympy.core import numbers

    sympify = numbers.sympify

    def convert(value, *arguments, **options):
        if not isinstance(value, str):
            return sympify(value, *arguments, **options)
        return numbers.Float(value) if set(value) & set(".eE") else numbers.Integer(value)

    numbers.sympify = convert


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


def _judge(request: str) -> bool:
    fields = json.loads(request)
    return equivalent(fields["gold"], fields["answer"])


def main() -> None:
    timeout_s = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable()
    close_sympys_eval()
    for gold, answer in _WARM_UP:
        equivalent(gold, answer)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    print("ready", flush=True)
    for request in sys.stdin:
        print(check(functools.partial(_judge, request), timeout_s), flush=True)


if __name__ == "__main__":
    main()
