"""Time and peak memory against T for every contestant, from the results of bench_loss_head.

    python -m bench.bench_loss_head --threads 1 --ops reverse_kl --json tokens.json \\
        --shapes 128x576x49152,256x576x49152,512x576x49152,1024x576x49152,2048x576x49152
    python -m bench.plot_loss_head tokens.json --out bench/results/loss_head_tokens

Writes OUT.svg and OUT.png. The caption names script, commit, hardware, threads and versions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from bench.common.problem import OURS

Lines = dict[str, list[dict]]


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("results", type=Path)
    p.add_argument("--op", default="reverse_kl")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(arguments)
    found = json.loads(args.results.read_text())
    lines = by_contestant(found["rows"], args.op, args.threads)
    draw(lines, caption(found, lines, args), args.out)
    print(f"written: {args.out}.svg and {args.out}.png")
    return 0


def by_contestant(rows: list[dict], op: str, threads: int) -> Lines:
    """The timed rows of the (D, V) with the most values of T, by contestant, in order of T.

    Raises ValueError if no (D, V) has two.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["op"] == op and row["threads"] == threads and "seconds" in row:
            groups.setdefault(tuple(row["shape"][1:]), []).append(row)
    chosen = max(groups.values(), key=_token_counts, default=[])
    if _token_counts(chosen) < 2:
        raise ValueError(f"results: {op} on {threads} thread(s) needs two values of T or more")
    lines: Lines = {}
    for row in sorted(chosen, key=lambda row: row["shape"][0]):
        lines.setdefault(row["contestant"], []).append(row)
    return lines


def _token_counts(rows: list[dict]) -> int:
    return len({row["shape"][0] for row in rows})


def caption(found: dict, lines: Lines, args: argparse.Namespace) -> str:
    row = lines["floor"][0]
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v)
    return (
        f"{args.op}, D {row['shape'][1]}, V {row['shape'][2]}, {row['dtype']}, forward + backward,"
        f" {args.threads} thread(s), medians; {found['script']} at commit {found['commit']},"
        f" {found['date'][:10]}\n{found['hardware']}; {versions}; tests {found['tests']}"
    )


def draw(lines: Lines, text: str, out: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2))
    for name, rows in lines.items():
        tokens = [row["shape"][0] for row in rows]
        label = rows[0]["title"]
        left.plot(tokens, [1000 * row["seconds"] for row in rows], label=label, **_style(name))
        # A rise below the meter's resolution would not fit a logarithmic axis.
        peaks = [(t, r["peak_bytes"] / 2**20) for t, r in zip(tokens, rows, strict=True)
                 if r.get("peak_bytes")]  # fmt: skip
        if peaks:
            right.plot(*zip(*peaks, strict=True), label=label, **_style(name))
    _finish(left, "process CPU time, ms")
    _finish(right, "peak extra memory, MiB")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=9)
    figure.text(0.01, 0.01, text, fontsize=7, color="0.35", va="bottom")
    figure.tight_layout(rect=(0, 0.06, 1, 0.88))
    out.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("svg", "png"):
        figure.savefig(out.parent / f"{out.name}.{ending}", dpi=150)
    plt.close(figure)


# Ours stand out; no peer changes its colour when another one is missing.
_COLOURS = {
    "native": "#c1121f", "triton": "#c1121f", "chunked": "#f4845f", "eager": "#8d99ae",
    "eager-fp32": "#2b2d42", "compile": "#5390d9", "compile-fp32": "#1d3f72", "trl": "#2a9d8f",
    "liger": "#9b5de5", "liger-triton": "#9b5de5", "cce": "#6a994e",
}  # fmt: skip


def _style(name: str) -> dict:
    if name == "floor":
        return {"color": "black", "linestyle": "--", "linewidth": 1.2}
    width = 2.4 if name in OURS else 1.4
    return {"color": _COLOURS[name], "linewidth": width, "marker": "o", "markersize": 4}


def _finish(axes: Axes, label: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="T, tokens", ylabel=label)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.grid(which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    ticks = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
    axes.set_xticks(ticks)


if __name__ == "__main__":
    sys.exit(main())
