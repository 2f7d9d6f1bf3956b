"""The step bench's results for a reader, in Markdown: tables, and each figure beside its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.train_step.problem import CONFIGURATIONS
from bench.train_step.worker import PHASES

MIB = 2**20
Row = dict[str, Any]


def report(found: Row) -> str:
    """The record as Markdown."""
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v)
    lines = [f"# {TITLES[found['mode']]}", ""]
    lines += [f"`{found['script']} {' '.join(found['arguments'])}`, commit {found['commit']},"]
    lines += [f"{found['date']}, {found['hardware']}; {versions}; {found['threads']} thread(s)."]
    lines += [f"{note}." for note in found["notes"]]
    lines += ["", *BODIES[found["mode"]](found["rows"])]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def target(name: str, value: float | None, least: float, unit: str = " x") -> list[str]:
    """A bullet; nothing where the value is not there."""
    if value is None:
        return []
    verdict = "reached" if value >= least else "NOT reached"
    return [f"* {name}: {value:.2f}{unit} ({least:g}{unit} aimed at: {verdict})"]


def by_configuration(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["configuration"], []).append(row)
    return found


def heading(name: str) -> list[str]:
    c = CONFIGURATIONS[name]
    at = c.lengths
    return [
        f"## {name}",
        "",
        f"Llama, D {c.hidden}, ffn {c.ffn}, {c.layers} layers, {c.heads} / {c.kv_heads} heads, "
        f"V {c.vocabulary}; question {at.question}, feedback {at.feedback}, response "
        f"{at.response}, G {at.samples}.",
        "",
    ]


def usable(row: Row) -> bool:
    return "cpu" in row and "disagrees" not in row


def steps(rows: Sequence[Row]) -> list[str]:
    lines = []
    for name, group in by_configuration(rows).items():
        lines += [*heading(name), *_step_table(group), ""]
        lines += [*_step_targets(group), *_flop_lines(group), *reasons(group), ""]
    return lines


def _step_table(rows: Sequence[Row]) -> list[str]:
    columns = ["contestant", "CPU s", "from-to", "wall s", *PHASES, "other", "peak MiB", "loss"]
    return table(columns, [_step_cells(row) for row in rows if usable(row)])


def _step_cells(row: Row) -> list[str]:
    phases = [row["phases"].get(name, [0.0, 0.0])[0] for name in PHASES]
    other = max(0.0, row["cpu"] - sum(phases))
    return [
        row["contestant"],
        f"{row['cpu']:.2f}",
        f"{min(row['cpu_rounds']):.2f}-{max(row['cpu_rounds']):.2f}",
        f"{row['wall']:.2f}",
        *(f"{spent:.2f}" for spent in (*phases, other)),
        f"{row['peak_bytes'] / MIB:.0f}",
        f"{row['loss']:.6g}",
    ]


def best_trl(rows: Sequence[Row]) -> Row | None:
    """TRL's fastest row with our objective that trains: bf16 weights swallow the updates."""
    able = [
        row
        for row in rows
        if usable(row)
        and row["engine"] == "trl"
        and row["objective"] == "full_logits"
        and row["precision"] != "bf16"
    ]
    return min(able, key=lambda row: row["cpu"], default=None)


def _step_targets(rows: Sequence[Row]) -> list[str]:
    by_name = {row["contestant"]: row for row in rows if usable(row)}
    best, lines = best_trl(rows), []
    theirs = best_trl([row for row in rows if row["precision"] == "fp32"])
    pairs = [
        ("fastsd-fp32", theirs, 2.5),
        ("fastsd-bf16", best, 4),
        ("fastsd-bf16-critique", best, 4),
    ]
    for name, other, least in pairs:
        ours = by_name.get(name)
        if ours is None or other is None:
            continue
        title = f"{other['contestant']} over {name}"
        lines += target(f"{title}, CPU time", other["cpu"] / ours["cpu"], least)
        lines += [f"  wall {other['wall'] / ours['wall']:.2f} x; " + _phase_ratios(ours, other)]
        lines += target(f"{title}, peak memory", other["peak_bytes"] / ours["peak_bytes"], 3)
    return lines


def _phase_ratios(ours: Row, other: Row) -> str:
    return ", ".join(
        f"{name} {other['phases'][name][0] / ours['phases'][name][0]:.2f} x"
        for name in PHASES
        if ours["phases"].get(name, [0])[0] > 0 and name in other["phases"]
    )


def _flop_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if not usable(row) or "flop" not in row:
            continue
        counted = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in row["flop"].items())
        lines += target(
            f"{row['contestant']}, student + teacher + head at the GEMM rate",
            100 * row["share_cpu"], 60, " %",
        )  # fmt: skip
        lines += [
            f"  GFLOP: {counted}; {row['gemm_cpu'] / 1e9:.0f} GFLOP/s of CPU time; by wall time "
            f"{100 * row['share_wall']:.0f} %; shares of the step: {_phase_shares(row)}"
        ]
    return lines


def _phase_shares(row: Row) -> str:
    return ", ".join(
        f"{name} {100 * row['phases'][name][0] / row['cpu']:.0f} %"
        for name in PHASES
        if name in row["phases"]
    )


def reasons(rows: Sequence[Row]) -> list[str]:
    """Who did not run and who computes something else."""
    return [
        f"* {row.get('contestant') or row.get('condition')}: {kind}: {row[key]}"
        for row in rows
        for key, kind in (("why_not", "did not run"), ("disagrees", "no time, it disagrees"))
        if key in row
    ]


def generation(rows: Sequence[Row]) -> list[str]:
    columns = [
        "contestant",
        "question",
        "rows",
        "CPU s",
        "from-to",
        "wall s",
        "tokens/s",
        "peak MiB",
    ]
    body = [
        [
            row["contestant"],
            str(row["question"]),
            str(row["rows"]),
            f"{row['cpu']:.2f}",
            f"{min(row['cpu_rounds']):.2f}-{max(row['cpu_rounds']):.2f}",
            f"{row['wall']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_bytes'] / MIB:.0f}",
        ]
        for row in rows
        if usable(row)
    ]
    return [*table(columns, body), "", *_generation_targets(rows), *reasons(rows)]


def _generation_targets(rows: Sequence[Row]) -> list[str]:
    lines = []
    cells = list(dict.fromkeys((row["question"], row["rows"]) for row in rows))
    for place, cell in enumerate(cells):
        here = [r for r in rows if usable(r) and (r["question"], r["rows"]) == cell]
        for ours in (row for row in here if row["engine"] == "fastsd"):
            title = f"{ours['contestant']}, question {cell[0]}, {cell[1]} rows"
            able = [r for r in here if r["engine"] == "hf" and r["precision"] == ours["precision"]
                    and r["cache"] != "prefilled"]  # fmt: skip
            best = min(able, key=lambda row: row["cpu"], default=None)
            if best is not None:
                ratio = best["cpu"] / ours["cpu"]
                lines += target(f"{title}, CPU time of {best['contestant']} over it", ratio,
                                (3, 4, 3)[place])  # fmt: skip
            if place == 2:
                lines += target(title, ours["tokens_per_second"], 300, " tokens/s")
    return lines


def sharing(rows: Sequence[Row]) -> list[str]:
    columns = ["configuration", "condition", "tokens", "network", "of it", "whole half",
               "CPU s shared", "unshared", "peak MiB shared", "unshared"]  # fmt: skip
    body = [
        [
            row["configuration"],
            row["condition"],
            f"{row['counted']:.2f} x",
            f"{row['measured_network']:.2f} x",
            f"{100 * row['share_network']:.0f} %",
            f"{row['measured_half']:.2f} x",
            *(f"{row[who]['cpu']:.2f}" for who in ("shared", "unshared")),
            *(f"{row[who]['peak_bytes'] / MIB:.0f}" for who in ("shared", "unshared")),
        ]
        for row in rows
        if "counted" in row
    ]
    lines = [*table(columns, body), ""]
    for row in rows:
        if "counted" in row:
            name = f"{row['configuration']}, {row['condition']}, ratio of times over that of tokens"
            lines += target(name, 100 * row["share_network"], 85, " %")
    return lines + reasons(rows)


def scaling(rows: Sequence[Row]) -> list[str]:
    body = [
        [
            row["axis"] + (f", G {row['samples']}" if row["axis"] == "question" else ""),
            f"{row['x'][0]:.0f}-{row['x'][-1]:.0f}",
            f"{row['start']:.3f}",
            f"{1000 * row['slope']:.3f}",
            f"{row['r2']:.5f}",
            " ".join(f"{y:.2f}" for y in row["cpu"]),
        ]
        for row in rows
    ]
    columns = ["along", "from-to", "CPU s at 0", "CPU ms each", "R^2", "CPU s"]
    return table(columns, body)


TITLES = {
    "steps": "One optimizer step against TRL's SDPO",
    "flops": "Phases of one optimizer step, and their distance to the GEMM rate",
    "generation": "Rollouts against Hugging Face generate",
    "sharing": "The training half with and without sharing",
    "scaling": "The training half along its lengths",
}
BODIES = {
    "steps": steps,
    "flops": steps,
    "generation": generation,
    "sharing": sharing,
    "scaling": scaling,
}
