"""The page's size and what a browser makes of it: bytes, seconds to write, to load, to be ready.

    python -m bench.bench_report [RUN ...] [--rollouts 64] [--tokens 2048] [--json PATH]

Without a run folder the page is that of random rollouts, each under two contexts (the noise of
tests/helpers/token_views.py, which nothing compresses). Loading is wall time in Debian's Chromium
from the request to the load event, ready the time until the script has made tokens of the first
response, median of the visits in one browser; without Chromium the page is measured alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common import measure
from fastsd.evaluation.views import FILE, write_views
from fastsd.records.folder import MetricsWriter
from fastsd.reporting.report import write_report
from tests.helpers.browser import chromium, missing
from tests.helpers.token_views import random_views

SCRIPT = "bench/bench_report.py"


def written(out: Path, *runs: Path) -> dict[str, Any]:
    """Writes the page of the runs: its bytes, and how many of them hold responses."""
    start = time.perf_counter()
    write_report(*runs, out=out)
    seconds = time.perf_counter() - start
    text = out.read_text(encoding="utf-8")
    responses = text[text.find("<details") : text.rfind("</details>")]
    return {"bytes": out.stat().st_size, "response_bytes": len(responses.encode()),
            "write_s": seconds}  # fmt: skip


def random_page(folder: Path, rollouts: int, tokens: int) -> dict[str, Any]:
    """The page of a run folder that has one update and per-token measurements."""
    with MetricsWriter(folder) as writer:
        writer.write(1, {"loss": 1.0})
    (folder / "config.resolved.toml").write_text("condition = 'all'\n")
    write_views(folder / FILE, random_views(rollouts, tokens))
    facts = {"page": f"{rollouts} rollouts of {tokens} random tokens, two contexts"}
    return facts | written(folder / "report.html", folder)


def visited(browser: Any, path: Path) -> tuple[float, float]:
    """Seconds to the load event, and until the first response is split into tokens."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    start = time.perf_counter()
    page.goto(path.resolve().as_uri())
    loaded = time.perf_counter() - start
    if page.locator("details").count():
        page.wait_for_selector("details[data-ready]")
    ready = time.perf_counter() - start
    context.close()
    return loaded, ready


def browsed(path: Path, visits: int) -> dict[str, Any]:
    if reason := missing():
        return {"why_not": reason}
    with chromium() as browser:
        version = browser.version
        visited(browser, path)  # starts the browser's own processes
        found = [visited(browser, path) for _ in range(visits)]
    load, ready = (statistics.median(seconds) for seconds in zip(*found, strict=True))
    return {"browser": f"Chromium {version}", "load_s": load, "ready_s": ready}


def line(row: dict[str, Any]) -> str:
    sizes = [f"{row[name]:,}" for name in ("bytes", "response_bytes")]
    cells = [row["page"], *sizes, f"{row['write_s']:.1f}"]
    seconds = [f"{row[name]:.2f}" if name in row else "-" for name in ("load_s", "ready_s")]
    return "| " + " | ".join([*cells, *seconds]) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    print("| page | bytes | of them responses | written in s | loaded | first response ready |")
    print("|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        if arguments.runs:
            names = ", ".join(run.name for run in arguments.runs)
            row = {"page": names} | written(path, *arguments.runs)
        else:
            row = random_page(Path(folder), arguments.rollouts, arguments.tokens)
        row |= browsed(path, arguments.visits)
        print(line(row), flush=True)
        rows.append(row)
    words = sys.argv[1:] if argv is None else list(argv)
    found = measure.record(SCRIPT, torch.device("cpu"), rows, words, visits=arguments.visits)
    measure.write(found, arguments.json)


if __name__ == "__main__":
    main()
