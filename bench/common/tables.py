"""What a reader sees of a cell: times beside the floor, memory beside times, errors beside both."""

from __future__ import annotations

from bench.common.cells import Cell
from bench.common.problem import OURS, flop, least_bytes

COLUMNS = (
    "",
    "ms",
    "spread",
    "wall ms",
    "x floor",
    "% of floor",
    "GFLOP/s",
    "peak MiB",
    "error",
    "n",
)


def cell_lines(cell: Cell, rows: list[dict]) -> list[str]:
    """A heading, one line for each contestant that ran, and the compilations."""
    tokens, width, vocabulary = cell.shape
    gflop = flop(cell.op, cell.shape) / 1e9
    mebibytes = least_bytes(cell.op, cell.shape, cell.dtype.itemsize) / 2**20
    head = f"{cell.op}  T {tokens}  D {width}  V {vocabulary}  {cell.facts()['dtype']}"
    lines = [f"{head}  {gflop:.1f} GFLOP, at least {mebibytes:.0f} MiB moved"]
    body = [_texts(row) for row in rows if "seconds" in row]
    widths = [max(len(x) for x in column) for column in zip(COLUMNS, *body, strict=True)]
    for texts in (COLUMNS, *body):
        first, *others = (
            f"{x:<{w}}" if i == 0 else f"{x:>{w}}"
            for i, (x, w) in enumerate(zip(texts, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *others]).rstrip())
    lines += [
        f"  first call with compilation: {row['title']} {row['first_call_seconds']:.1f} s"
        for row in rows
        if "first_call_seconds" in row
    ]
    return lines


def reason_lines(rows: list[dict]) -> list[str]:
    """Who did not run, and why."""
    return [f"  not run: {r['title']}: {r['why_not']}" for r in rows if "why_not" in r]


def _texts(row: dict) -> tuple[str, ...]:
    return (
        row["title"],
        f"{1000 * row['seconds']:.1f}",
        f"{100 * (row['most'] - row['least']) / row['seconds']:.0f}%",
        f"{1000 * row['wall']:.1f}",
        f"{row['x_floor']:.2f}",
        f"{100 / row['x_floor']:.0f}",
        f"{row['gflop_per_second']:.0f}",
        peak_text(row),
        error_text(row.get("errors", {})),
        str(row["rounds"]),
    )


def peak_text(row: dict) -> str:
    peak = row.get("peak_bytes")
    return "" if peak is None else f"{peak / 2**20:.0f}"


def error_text(errors: dict[str, float]) -> str:
    """Loss, d hidden and d head; for statistics the worst of them."""
    if "d_head" in errors:
        return " ".join(f"{errors[key]:.1e}" for key in ("loss", "d_hidden", "d_head"))
    return f"{max(errors.values()):.1e}" if errors else ""


def speedup_lines(rows: list[dict]) -> list[str]:
    """How many times longer than our fastest implementation each peer takes."""
    timed = {row["contestant"]: row for row in rows if "seconds" in row}
    found = [timed[name] for name in OURS if name in timed]
    peers = [row for name, row in timed.items() if name not in (*OURS, "floor")]
    if not found or not peers:
        return []
    best = min(found, key=lambda row: row["seconds"])
    ratios = [f"{row['title']} {row['seconds'] / best['seconds']:.2f}" for row in peers]
    return [f"  times as long as {best['title']}: " + "; ".join(ratios)]


def error_lines(rows: list[dict]) -> list[str]:
    """Errors of one operation, type and logit scale, a line for each contestant."""
    width = max(len(row["title"]) for row in rows)
    found = [row for row in rows if "errors" in row]
    return [f"  {row['title']:<{width}}  {error_text(row['errors'])}" for row in found]
