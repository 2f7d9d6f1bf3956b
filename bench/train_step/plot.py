"""Time of the training half along its lengths, from the rows of `bench_train_step --scaling`.

Left: along the response and the group, with the fitted line. Right: along the question for several
group sizes; were the question computed for each response, the lines' slopes would be as G is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_COLOURS = ("#c1121f", "#f4845f", "#1d3f72", "#5390d9")


def plot(found: dict[str, Any], out: Path) -> None:
    """Writes OUT.svg and OUT.png."""
    rows = found["rows"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.6))
    for axes, axis, label in (
        (left, "response", "tokens of a response"),
        (middle, "samples", "responses a question"),
        (right, "question", "tokens of the question"),
    ):
        _draw(axes, [row for row in rows if row["axis"] == axis], label)
    left.set_ylabel("student + teacher + head, CPU s")
    right.legend(frameon=False, fontsize=9)
    figure.text(0.01, 0.01, caption(found), fontsize=7, color="0.35", va="bottom")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("svg", "png"):
        figure.savefig(out.parent / f"{out.name}.{ending}", dpi=150)
    plt.close(figure)


def caption(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v)
    return (
        f"{found['configuration']}, {found['precision']}, reference condition, live teacher,"
        f" {found['threads']} thread(s), medians; {found['script']} at commit {found['commit']},"
        f" {found['date'][:10]}\n{found['hardware']}; {versions}"
    )


def _draw(axes: Axes, rows: list[dict[str, Any]], label: str) -> None:
    for row, colour in zip(rows, _COLOURS, strict=False):
        start, slope = row["start"], row["slope"]
        text = f"G {row['samples']}: {1000 * slope:.2f} ms a token, R$^2$ {row['r2']:.4f}"
        axes.plot(row["x"], row["cpu"], "o", color=colour, markersize=5, label=text)
        ends = [0.0, row["x"][-1]]
        axes.plot(ends, [start + slope * x for x in ends], color=colour, linewidth=1.2)
    if len(rows) == 1:
        axes.set_title(f"R$^2$ {rows[0]['r2']:.5f}", fontsize=10)
    axes.set(xlabel=label, xlim=(0, None), ylim=(0, None))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
