"""Several run folders on one page: names, and a comparison that pairs what can be paired.

One run is shown as its summary has it. Of several, each condition is called
"<run folder> · <condition>". Where runs were evaluated on the same questions with the same number
of samples, differences are paired by question; where they were not, the figures stand side by side
and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd.evaluation.results import EvalResult, paired_difference, pooled_interval
from fastsd.evaluation.scores import METRICS, Interval
from fastsd.evaluation.summary import (
    PAIRS,
    difference_rows,
    percent,
    points,
    score_headers,
    score_rows,
)
from fastsd.records.folder import RunFolderError
from fastsd.reporting.runs import Run, read_run

BETWEEN = " · "


@dataclass(frozen=True)
class Scored:
    """One row of the comparison: its label, run and condition ("base": before training), and one
    result per seed."""

    label: str
    run: str
    condition: str
    results: tuple[EvalResult, ...]

    @property
    def asked(self) -> tuple[tuple[str, ...], int]:
        """Rows with the same value can be paired: the questions and the samples of each."""
        return tuple(self.results[0].question_ids), self.results[0].samples


def read_runs(folders: Sequence[Path | str]) -> dict[str, Run]:
    """Name -> run, in order; "" is the name of an only one.

    Names are the folders' own, with as many parents as tell them apart. Raises RunFolderError for a
    folder that is given twice or is no run folder.
    """
    runs = [read_run(folder) for folder in folders]
    paths = [run.folder for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise RunFolderError(f"{path} is given twice; name each run folder once")
    if len(runs) == 1:
        return {"": runs[0]}
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return {printable(name): run for name, run in zip(names, runs, strict=True)}


def printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def labelled(run: str, name: str) -> str:
    """ "<run> · <name>", or the name alone where there is one run."""
    return f"{run}{BETWEEN}{name}" if run else name


def comparison(runs: Mapping[str, Run]) -> dict[str, Any] | None:
    """What report.html.j2 shows under "Comparison", without figures; None before there is a base
    and a final evaluation. "intervals": label -> (mean, low, high) of Avg@k, for the figure."""
    known = {name: run.summary for name, run in runs.items() if run.summary}
    if not known:
        return None
    if len(runs) == 1:
        return _of_one(next(iter(known.values())))
    rows = [one for name, summary in known.items() for one in scored(name, summary)]
    return _of_several(_bases_once(rows))


def _of_one(summary: Mapping[str, Any]) -> dict[str, Any]:
    base = summary["base"]
    intervals = {"base": (base["avg_at_k"], *base["intervals"]["avg_at_k"])}
    pooled = {name: tuple(one["pooled"]["avg_at_k"]) for name, one in summary["conditions"].items()}
    return {
        "basis": f"{base['questions']} held-out questions, {base['samples']} samples each; 95 % "
        "bootstrap intervals over questions.",
        "headers": score_headers(summary),
        "rows": score_rows(summary),
        "differences": difference_rows(summary),
        "average": f"Avg@{base['samples']}",
        "intervals": intervals | pooled,
    }


def scored(run: str, summary: Mapping[str, Any]) -> list[Scored]:
    """The base and the conditions of one run's summary."""
    base = EvalResult.from_json(summary["base"])
    rows = [Scored(labelled(run, "base"), run, "base", (base,))]
    for name, one in summary["conditions"].items():
        results = tuple(EvalResult.from_json(record) for record in one["evals"])
        rows.append(Scored(labelled(run, name), run, name, results))
    return rows


def _bases_once(rows: Sequence[Scored]) -> list[Scored]:
    """Runs that began with the same checkpoint have the same base: one row for all of them."""
    bases = [row for row in rows if row.condition == "base"]
    if len(bases) > 1 and all(row.results == bases[0].results for row in bases):
        rest = [row for row in rows if row.condition != "base"]
        return [Scored("base", "", "base", bases[0].results), *rest]
    return list(rows)


def _of_several(rows: Sequence[Scored]) -> dict[str, Any]:
    groups = {row.asked: [other for other in rows if other.asked == row.asked] for row in rows}
    sizes = [f"{len(questions)} × {samples}" for questions, samples in groups]
    if len(groups) == 1:
        questions, samples = rows[0].asked
        basis = f"The same {len(questions)} held-out questions, {samples} samples each; "
        k = f"@{samples}"
    else:
        basis = (
            "These runs were not evaluated on the same questions and samples "
            f"({', '.join(sizes)}), so their figures stand side by side, and only those with the "
            "same ones are paired; "
        )
        k = "@k"
    intervals = {row.label: [pooled_interval(row.results, m) for m in METRICS] for row in rows}
    headers = ["condition", "questions × k", f"Avg{k} %", f"pass{k} %", f"maj{k} %", "by seed"]
    return {
        "basis": f"{basis}95 % bootstrap intervals over questions.",
        "headers": headers,
        "rows": [_row(row, intervals[row.label]) for row in rows],
        "differences": [one for group in groups.values() for one in _differences(group)],
        "average": f"Avg{k}",
        "intervals": {label: three[0] for label, three in intervals.items()},
    }


def _row(row: Scored, intervals: Sequence[Interval]) -> list[str]:
    questions, samples = row.asked
    seeds = [f"{100 * result.avg_at_k:.1f}" for result in row.results]
    by_seed = "" if row.condition == "base" else " ".join(seeds)
    size = f"{len(questions)} × {samples}"
    return [row.label, size, *map(percent, intervals), by_seed]


def _differences(rows: Sequence[Scored]) -> list[list[str]]:
    found = []
    for first in rows:
        for second in rows:
            if _worth_a_row(first, second, rows):
                difference = paired_difference(first.results, second.results)
                found.append([f"{first.label} − {second.label}", points(difference)])
    return found


def _worth_a_row(first: Scored, second: Scored, rows: Sequence[Scored]) -> bool:
    """Within a run the pairs of its summary; between two, the same condition, the later run first,
    and where they have none in common the summary's pairs."""
    if first.condition == "base":
        return False
    if second.condition == "base":
        return second.run in ("", first.run)
    if first.run == second.run:
        return (first.condition, second.condition) in PAIRS
    mine, yours = ({r.condition for r in rows if r.run == x.run} for x in (first, second))
    if (mine & yours) - {"base"}:
        return first.condition == second.condition and rows.index(first) > rows.index(second)
    return (first.condition, second.condition) in PAIRS
