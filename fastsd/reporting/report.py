"""A report: what each section of the page shows, from the files of run folders.

The page is a function of those files and can be written again at any time. It is one file that
loads nothing and can be read without script (`page.py`).

    RUN/{summary.json, localisation.json, advantages.parquet}
    RUN/<condition>-seed<k>/{metrics.jsonl, evaluation.json, completions/}

A RUN without such children is a single run and is shown as its own only child; a RUN without
summary.json (a crash) is compared from the evaluations that exist; what has no file has no section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.evaluation.views import FILE as VIEWS
from fastsd.evaluation.views import TokenView, read_views
from fastsd.records.completions import read_last_completions
from fastsd.reporting import curves
from fastsd.reporting.comparison import comparison, labelled, read_runs
from fastsd.reporting.model_card import limits_of_run
from fastsd.reporting.page import inline_picture, write_page
from fastsd.reporting.runs import Run
from fastsd.reporting.tokens import ROOM, localisation_part, token_section
from fastsd.reporting.warnings import warnings_of

if TYPE_CHECKING:
    from markupsafe import Markup

    from fastsd.types import Task


SAMPLES_PER_CONDITION = 4
TRL_COLUMNS = {"step", "prompt", "completion", "advantage", "critique", "divergence"}
SECTIONS = {
    "warnings": "Warnings",
    "comparison": "Comparison",
    "curves": "Training",
    "phases": "Time and tokens",
    "localisation": "Where the credit falls",
    "tokens": "Token by token",
    "samples": "Sample completions",
}
# Section -> id of its heading, where that is another word.
IDS = {"curves": "training", "phases": "time"}


def write_report(*run_dirs: Path | str, out: Path | str | None = None) -> Path:
    """Write one page about one or several run folders and return its path.

    out: the file; by default report.html in the run folder of an only run, else in the working
    directory. Raises RunFolderError naming the file that is missing or broken.
    """
    runs = read_runs(run_dirs)
    folders = [run.folder for run in runs.values()]
    path = (
        Path(out)
        if out is not None
        else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    )
    parts = _parts(runs)
    contents = [
        (IDS.get(part, part), name)
        for part, name in SECTIONS.items()
        if parts[part] or part == "comparison"
    ]
    return write_page(
        path,
        "report.html.j2",
        title=" and ".join(folder.name for folder in folders) if len(folders) < 3 else path.stem,
        subtitle=_subtitle(runs),
        contents=contents,
        limits=_limits(runs),
        **parts,
    )


def _parts(runs: Mapping[str, Run]) -> dict[str, Any]:
    """What each section shows; falsy where there is nothing for it."""
    metrics, compared = curves.metrics_of(runs), comparison(runs)
    if compared:
        picture = curves.intervals(compared["average"], compared["intervals"])
        compared["figures"] = [inline_picture(picture)]
    phases = curves.phases(metrics)
    if phases:
        phases["figures"] = _pictures(phases["figures"])
    views = {name: _views(run) for name, run in runs.items()}
    return {
        "warnings": warnings_of(runs),
        "comparison": compared,
        "curves": _pictures(curves.curves(runs, metrics)),
        "phases": phases,
        "localisation": _localisation(runs, views),
        "tokens": _tokens(runs, views),
        "samples": [one for name, run in runs.items() for one in _samples(name, run)],
    }


def _pictures(drawn: Sequence[str]) -> list[Markup]:
    return [inline_picture(svg) for svg in drawn]


def _views(run: Run) -> list[TokenView]:
    path = run.folder / VIEWS
    return read_views(path) if path.exists() else []


def _localisation(
    runs: Mapping[str, Run], views: Mapping[str, Sequence[TokenView]]
) -> dict[str, Any] | None:
    """Table and figures; of several runs, one table and the bars of all contexts."""
    where = {
        labelled(run, context): one
        for run, one_run in runs.items()
        for context, one in ((one_run.summary or {}).get("localisation") or {}).items()
    }
    if not where:
        return None
    return localisation_part(views[""] if "" in views else (), where)


def _tokens(
    runs: Mapping[str, Run], views: Mapping[str, Sequence[TokenView]]
) -> list[tuple[str, dict[str, Any]]]:
    room = ROOM // max(1, sum(map(bool, views.values())))
    return [
        (name, token_section(views[name], _task(run), room))
        for name, run in runs.items()
        if views[name]
    ]


def _task(run: Run) -> Task | None:
    """The task whose steps the run's responses have; None for data from files."""
    from fastsd.tasks import load_task

    data = run.config.get("data", {})
    return load_task(data["task"], **data.get("task_options", {})) if data.get("task") else None


def _subtitle(runs: Mapping[str, Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs"
    run = next(iter(runs.values()))
    facts, summary = [", ".join(run.children)], run.summary or {}
    if seeds := summary.get("seeds"):
        facts.append(f"{seeds} seed{'s' if seeds > 1 else ''} each")
    if seconds := summary.get("seconds"):
        facts.append(f"{seconds:.0f} s in all")
    return " · ".join(facts)


def _limits(runs: Mapping[str, Run]) -> list[str]:
    """What must be said beside the results, each once."""
    known = [limits_of_run(run) for run in runs.values()]
    return list(dict.fromkeys(limit for limits in known for limit in limits))


def _samples(name: str, run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """A few completions of each condition's first seed, wrong ones first."""
    chosen = []
    for paths in run.children.values():
        rows = read_last_completions(paths[0])
        if rows:
            wrong, right = [], []
            for row in map(_sample, rows):
                (right if row["verdict"] == "right" else wrong).append(row)
            keep = wrong[: SAMPLES_PER_CONDITION - 1]
            label = paths[0].name if paths[0] != run.folder else name or paths[0].name
            label = label if label == name else labelled(name, label)
            chosen.append((label, keep + right[: SAMPLES_PER_CONDITION - len(keep)]))
    return chosen


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    reward = next((value for name, value in row.items() if name not in TRL_COLUMNS), None)
    divergence = row["divergence"]
    return {
        "question": row["prompt"][-1]["content"],
        "response": row["completion"][-1]["content"],
        "critique": row["critique"],
        "reward": "not scored" if reward is None else f"{reward:g}",
        "verdict": "" if reward is None else "right" if reward >= 1.0 else "wrong",
        "divergence": "–" if divergence is None else f"{divergence:.3f}",
    }
