"""One page that shows a run: `python -m fastsd.report RUN` writes RUN/report.html.

The page is a function of the run folder's files and can be written again at any time. It is
self-contained: no request, no script, pictures inline; a content security policy says so to the
browser too. Every text on it that came from a model, a critic or a data set is escaped by jinja.

    RUN/summary.json, RUN/<condition>-seed<k>/{metrics.jsonl, evaluation.json, completions/}

A RUN without such children is a single run and is shown as its own only child; a RUN without
summary.json (a crash) is compared from the evaluations that exist.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsd.run_folder import (
    CompletionRow,
    MetricsWriter,
    Run,
    RunFolderError,
    append_evaluation,
    read_evaluations,
    read_last_completions,
    read_metrics,
    read_run,
    replace_text,
    write_completions,
)
from fastsd.summary import (
    LOCALISATION_HEADERS,
    console_table,
    difference_rows,
    limits_of,
    localisation_rows,
    plain_table,
    score_headers,
    score_rows,
    summarise,
)

__all__ = [
    "CompletionRow",
    "MetricsWriter",
    "RunFolderError",
    "append_evaluation",
    "console_table",
    "limits_of",
    "plain_table",
    "summarise",
    "write_completions",
    "write_model_card",
    "write_report",
]

# Metric in metrics.jsonl -> title and unit of its panel.
CURVES = {
    "reward/mean": ("Reward", "mean reward"),
    "divergence/mean": ("Divergence from the teacher", "nats per token"),
    "entropy/mean": ("Entropy of the solver", "nats per token"),
    "length/mean": ("Response length", "tokens"),
}
SAMPLES_PER_CONDITION = 4
TRL_COLUMNS = {"step", "prompt", "completion", "advantage", "critique", "divergence"}


def _curves(run: Run) -> list[str]:
    """The training panels that have data, as SVG."""
    from fastsd import plots

    panels: list[tuple[str, str, str, dict[str, list]]] = []
    evaluations: dict[str, list] = {}
    samples = 0
    for name, paths in run.children.items():
        for results in filter(None, map(read_evaluations, paths)):
            steps = [step for step, _ in results]
            evaluations.setdefault(name, []).append((steps, [100 * r.avg_at_k for _, r in results]))
            samples = results[0][1].samples
    panels.append(("avg", f"Avg@{samples} on held-out questions", "%", evaluations))
    lines = {name: [read_metrics(path) for path in paths] for name, paths in run.children.items()}
    for metric, (title, unit) in CURVES.items():
        series: dict[str, list] = {}
        for name, seeds in lines.items():
            for seed in seeds:
                known = [(m["step"], m[metric]) for m in seed if m.get(metric) is not None]
                if known:
                    series.setdefault(name, []).append(tuple(zip(*known, strict=True)))
        panels.append((metric.replace("/", "-"), title, unit, series))
    return [plots.curves(name, title, data, unit) for name, title, unit, data in panels if data]


def _localisation_figures(summary: Mapping[str, Any] | None) -> list[str]:
    from fastsd import plots

    if not summary or not summary["localisation"]:
        return []
    places = ("before", "at", "after", "correct")
    labels: Sequence[str] = ("before", "first wrong step", "after", "correct responses")
    means: dict[str, dict[str, float | None]] = {
        context: dict(zip(labels, (one["mean_abs"][p] for p in places), strict=True))
        for context, one in summary["localisation"].items()
    }
    title = "Mean |A| around the first wrong step"
    return [plots.bars("localisation", title, means, "mean |log T − log S|")]


def _samples(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """A few completions of each condition's first seed, wrong ones first."""
    chosen = []
    for paths in run.children.values():
        rows = read_last_completions(paths[0])
        if rows:
            wrong, right = [], []
            for row in map(_sample, rows):
                (right if row["verdict"] == "right" else wrong).append(row)
            keep = wrong[: SAMPLES_PER_CONDITION - 1]
            chosen.append((paths[0].name, keep + right[: SAMPLES_PER_CONDITION - len(keep)]))
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


def _warnings(run: Run) -> list[str]:
    found = []
    for path in (path for paths in run.children.values() for path in paths):
        count = sum(line.get("non_finite", 0) for line in read_metrics(path))
        if count:
            found.append(f"{path.name}: {count} metric values were not finite numbers")
    return found


def _environment() -> Any:
    import jinja2
    from markupsafe import Markup

    def markdown(value: object) -> Markup:
        """Text as text in a Markdown line: HTML escaped, Markdown's own signs backslashed."""
        line = html.escape(" ".join(str(value).split()), quote=False)
        return Markup(re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", line))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = markdown
    return environment


def _tables(run: Run) -> dict[str, Any]:
    """What page and model card share."""
    summary, task = run.summary, run.config.get("data", {}).get("task")
    return {
        "summary": summary,
        "score_headers": score_headers(summary) if summary else [],
        "scores": score_rows(summary) if summary else [],
        "differences": difference_rows(summary) if summary else [],
        "limits": summary["limits"] if summary else limits_of(task),
    }


def write_report(run_dir: Path | str) -> Path:
    """Write <run>/report.html from the folder's files and return its path.

    Raises RunFolderError naming the file that is missing or broken.
    """
    from markupsafe import Markup

    run = read_run(run_dir)
    summary = run.summary
    facts = [", ".join(run.children)]
    if summary and summary.get("seeds"):
        facts.append(f"{summary['seeds']} seed{'s' if summary['seeds'] > 1 else ''} each")
    if summary and summary.get("seconds"):
        facts.append(f"{summary['seconds']:.0f} s in all")
    page = _environment().get_template("report.html.j2")
    text = page.render(
        **_tables(run),
        title=run.folder.name,
        subtitle=" · ".join(facts),
        warnings=_warnings(run),
        # Markup: pictures drawn by us, whose texts matplotlib has escaped
        figures=[Markup(svg) for svg in _curves(run)],
        localisation=localisation_rows(summary) if summary else [],
        localisation_headers=LOCALISATION_HEADERS,
        localisation_figures=[Markup(svg) for svg in _localisation_figures(summary)],
        samples=_samples(run),
    )
    path = run.folder / "report.html"
    replace_text(path, text)
    return path


def write_model_card(run_dir: Path | str, checkpoint_dir: Path | str) -> Path:
    """Write <run>/README.md, the model card of one checkpoint of the run, and return its path.

    It names the checkpoint by its folder's name and states results with their intervals and limits.
    """
    run, checkpoint = read_run(run_dir), Path(checkpoint_dir).name
    if not re.fullmatch(r"[\w.-]+", checkpoint):
        raise RunFolderError(
            f"a checkpoint folder's name may hold [A-Za-z0-9_.-]; got {checkpoint!r}"
        )
    config = run.config
    model = config.get("model", {}).get("name", "") or "a causal language model"
    condition = config.get("condition", next(iter(run.children)))
    names = ("teacher.kind", "loss.divergence", "optim.lr", "optim.steps", "rollout.temperature")
    settings = [("condition", condition)]
    for section, field in (name.split(".") for name in names):
        if field in config.get(section, {}):
            settings.append((f"{section}.{field}", config[section][field]))
    text = (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            **_tables(run),
            base=model,
            hub_base=model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None,
            condition=condition,
            description=DESCRIPTIONS.get(condition, DESCRIPTIONS["other"]),
            checkpoint=checkpoint,
            settings=settings,
        )
    )
    path = run.folder / "README.md"
    replace_text(path, re.sub(r"\n{3,}", "\n\n", text))
    return path


DESCRIPTIONS = {
    "grpo": "Trained by GRPO on the correctness of its own answers.",
    "reference": "Trained by on-policy self-distillation: on its own answers, towards the same "
    "model shown a reference solution.",
    "critique": "Trained by on-policy self-distillation: on its own answers, towards the same "
    "model shown a step-aligned critique of each answer.",
    "other": "Trained with fastsd.",
}


def main(argv: Sequence[str] | None = None) -> int:
    from fastsd.cli import run_main

    parser = argparse.ArgumentParser(
        prog="python -m fastsd.report", description="Writes RUN/report.html from the run's files."
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    arguments = parser.parse_args(argv)
    return run_main(lambda: print(write_report(arguments.run)))


if __name__ == "__main__":
    sys.exit(main())
