"""A process that compares mathematical answers; fastsd.rewards.functions starts it by file name.

Run as `python -P math_worker.py TIMEOUT_S`; it imports math-verify and fastsd's sandbox, but not
torch. Lines on stdin are JSON {"gold": str, "answer": str}; for each, one line on stdout: "right",
"wrong" or "timeout". After "ready" the process itself never touches answer text: it forks a child
per answer from its warm state and kills it with SIGKILL when the time is up. So no answer can
wedge, bloat or poison the process, and a replacement costs a fork instead of an import of sympy.

Answers are only parsed as LaTeX (an ANTLR grammar that builds sympy nodes). Two ways from text to
Python's `eval` had to be closed: math-verify's `ExprExtractionConfig` calls sympy's `parse_expr`
and is not used; the LaTeX parser calls `sympy.Number(text)`, which ends in `parse_expr` as well,
so numbers are converted here. Whatever the libraries may do, the child is in the sandbox
(fastsd/runtime/sandbox.py), whose limits its docstring names.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
from typing import Any

from fastsd.runtime.sandbox import check

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
