"""What a run's metrics and evaluations look like: intervals, curves, phase times, tokens saved.

Everything is drawn by `plots.py`; here is what is drawn, and from which metric. Of several runs the
condition decides a curve's colour and the run its dash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsd.records.folder import read_evaluations, read_metrics
from fastsd.reporting.comparison import BETWEEN, labelled
from fastsd.reporting.runs import Run

# Metric in metrics.jsonl -> title and unit of its panel.
CURVES = {
    "reward/mean": ("Reward", "mean reward"),
    "divergence/mean": ("Divergence from the teacher", "nats per token"),
    "entropy/mean": ("Entropy of the solver", "nats per token"),
    "length/mean": ("Response length", "tokens"),
}
# Phases of an update, in order, and their colours; they hold on white and on near-black.
PHASES = {
    "rollout": "#1f8fd6",
    "critic": "#e08a00",
    "student": "#3aa655",
    "teacher": "#a56eff",
    "head": "#d1495b",
    "optimizer": "#8a939c",
}
DASHES = ("-", "--", ":", "-.")
TOKEN_HEADERS = ["tokens of one update", "computed", "saved", "full rows ÷ computed"]

Metrics = dict[str, list[list[dict[str, Any]]]]


def metrics_of(runs: Mapping[str, Run]) -> Metrics:
    """Label -> the lines of metrics.jsonl of each seed."""
    return {
        labelled(run, name): [read_metrics(path) for path in paths]
        for run, one in runs.items()
        for name, paths in one.children.items()
    }


def curves(runs: Mapping[str, Run], metrics: Metrics) -> list[str]:
    """The training panels that have data, as SVG."""
    panels: list[tuple[str, str, str, dict[str, list]]] = []
    evaluations: dict[str, list] = {}
    samples = set()
    for run, one in runs.items():
        for name, paths in one.children.items():
            for results in filter(None, map(read_evaluations, paths)):
                steps = [step for step, _ in results]
                values = [100 * result.avg_at_k for _, result in results]
                evaluations.setdefault(labelled(run, name), []).append((steps, values))
                samples.add(results[0][1].samples)
    k = samples.pop() if len(samples) == 1 else "k"
    panels.append(("avg", f"Avg@{k} on held-out questions", "%", evaluations))
    for metric, (title, unit) in CURVES.items():
        series: dict[str, list] = {}
        for name, seeds in metrics.items():
            for seed in seeds:
                known = [(m["step"], m[metric]) for m in seed if m.get(metric) is not None]
                if known:
                    series.setdefault(name, []).append(tuple(zip(*known, strict=True)))
        panels.append((metric.replace("/", "-"), title, unit, series))
    styles = styles_of(metrics)
    return [_curves(name, title, unit, data, styles) for name, title, unit, data in panels if data]


def styles_of(labels: Sequence[str] | Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Label -> (colour, dash). One run: the conditions' own; several: a dash for each run."""
    from fastsd.reporting.plots import OTHER_STYLE, STYLES

    runs = list(dict.fromkeys(label.rpartition(BETWEEN)[0] for label in labels))
    styles = {}
    for label in labels:
        run, _, condition = label.rpartition(BETWEEN)
        color, dash = STYLES.get(condition, OTHER_STYLE)
        styles[label] = (color, DASHES[runs.index(run) % len(DASHES)] if len(runs) > 1 else dash)
    return styles


def _curves(
    name: str, title: str, unit: str, lines: Mapping[str, list], styles: Mapping[str, tuple]
) -> str:
    from fastsd.reporting import plots

    def draw(axes: Any) -> None:
        for label, seeds in lines.items():
            color, dash = styles[label]
            if len(seeds) > 1:
                for steps, values in seeds:
                    axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.8)
            steps, values = _mean_curve(seeds)
            marker = "o" if len(steps) < 8 else None
            axes.plot(steps, values, dash, color=color, linewidth=2, marker=marker, markersize=4)
            axes.plot([], [], dash, color=color, linewidth=2, label=label[: plots.LABEL])
        axes.set_xlabel("update")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.15, color=plots.INK)
        axes.legend()

    return plots.figure(name, title, draw)


def _mean_curve(seeds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[list, list]:
    """The mean over the steps that every seed has."""
    by_seed = [dict(zip(steps, values, strict=True)) for steps, values in seeds]
    shared = sorted(set.intersection(*(set(one) for one in by_seed)))
    return shared, [sum(one[step] for one in by_seed) / len(by_seed) for step in shared]


def intervals(average: str, found: Mapping[str, Sequence[float]]) -> str:
    """One panel: each row's mean and 95 % interval; found: label -> fractions (mean, low, high)."""
    from fastsd.reporting import plots

    labels = list(found)
    colors = styles_of(labels)

    def draw(axes: Any) -> None:
        _set_height(axes, 0.9 + 0.36 * len(labels))
        for place, label in enumerate(labels):
            mean, low, high = (100 * value for value in found[label])
            base = label.rpartition(BETWEEN)[2] == "base"
            color = plots.INK if base else colors[label][0]
            axes.plot([low, high], [place, place], color=color, linewidth=2, alpha=0.7)
            axes.plot([mean], [place], "o", color=color, markersize=7)
            axes.annotate(
                f"{mean:.1f}",
                (mean, place),
                (0, 7),
                textcoords="offset points",
                ha="center",
                size=9,
            )
        axes.set_yticks(range(len(labels)), [label[: plots.LABEL] for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.7)
        axes.set_xlabel("%")
        axes.grid(axis="x", alpha=0.15, color=plots.INK)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    return plots.figure("intervals", f"{average} and its 95 % interval", draw)


def _set_height(axes: Any, inches: float) -> None:
    axes.figure.set_size_inches(axes.figure.get_size_inches()[0], inches)


def phases(metrics: Metrics) -> dict[str, Any] | None:
    """The stacked bars of seconds per update, and the rows of tokens computed and saved."""
    means = {
        label: {phase: _mean(seeds, f"time/{phase}_s") for phase in PHASES}
        for label, seeds in metrics.items()
    }
    timed = {
        label: {phase: value for phase, value in one.items() if value is not None}
        for label, one in means.items()
    }
    timed = {label: one for label, one in timed.items() if one}
    rows = []
    for label, seeds in metrics.items():
        for role in ("student", "teacher"):
            computed = _mean(seeds, f"tokens/{role}")
            saved = _mean(seeds, f"tokens_saved/{role}")
            if computed and saved is not None:
                ratio = f"{(computed + saved) / computed:.2f} ×"
                rows.append([f"{label}, {role}", f"{computed:,.0f}", f"{saved:,.0f}", ratio])
    if not timed and not rows:
        return None
    return {"figures": [_stacked(timed)] if timed else [], "headers": TOKEN_HEADERS, "rows": rows}


def _mean(seeds: Sequence[Sequence[Mapping[str, Any]]], name: str) -> float | None:
    """Over all updates of all seeds that have the metric."""
    values = [line[name] for seed in seeds for line in seed if line.get(name) is not None]
    return sum(values) / len(values) if values else None


def _stacked(timed: Mapping[str, Mapping[str, float]]) -> str:
    from fastsd.reporting import plots

    labels = list(timed)

    def draw(axes: Any) -> None:
        _set_height(axes, 1.25 + 0.36 * len(labels))
        left = dict.fromkeys(labels, 0.0)
        for phase, color in PHASES.items():
            widths = [timed[label].get(phase, 0.0) for label in labels]
            starts = [left[label] for label in labels]
            if any(widths):
                axes.barh(range(len(labels)), widths, 0.6, starts, color=color, label=phase)
            left = {label: left[label] + timed[label].get(phase, 0.0) for label in labels}
        for place, label in enumerate(labels):
            text = f" {left[label]:.3g} s"
            axes.annotate(text, (left[label], place), va="center", color=plots.INK, size=9)
        axes.set_yticks(range(len(labels)), [label[: plots.LABEL] for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.set_xlabel("seconds per update")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.figure.legend(loc="outside lower center", ncols=6, fontsize=8, columnspacing=1.2)

    return plots.figure("phases", "Where an update’s time goes", draw)
