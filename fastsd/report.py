"""One page that shows runs: `python -m fastsd.report RUN [RUN ...]` writes report.html.

What is on the page, and from which files: fastsd/reporting/report.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastsd.reporting.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    from fastsd.runtime.program import run_main

    parser = argparse.ArgumentParser(
        prog="python -m fastsd.report",
        description="Writes one self-contained page about one or several runs from their files.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page; default: RUN/report.html, of several runs ./report.html",
    )
    arguments = parser.parse_args(argv)
    return run_main(lambda: print(write_report(*arguments.runs, out=arguments.out)))


if __name__ == "__main__":
    sys.exit(main())
