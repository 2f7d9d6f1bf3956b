"""The comparison of conditions: from evaluations to the summary, and from the summary to a table.

`summary.json` holds shares as fractions in [0, 1]; tables show them in percent, differences in
points. Whatever shows the result shows its limits: they are part of the summary, not of a page.

Axes: none; a "pooled" interval is [mean, low, high] as `fastsd.evaluation.scores` defines it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from fastsd.evaluation.localisation import Localisation
from fastsd.evaluation.results import EvalResult, paired_difference, pooled_interval
from fastsd.evaluation.scores import METRICS

PAIRS = (("critique", "grpo"), ("critique", "reference"), ("reference", "grpo"))

GENERAL_LIMITS = (
    "The 95 % intervals are about the questions: seeds are averaged within each question. How much "
    "training seeds differ is not in them; the values by seed stand beside them.",
)

TASK_LIMITS = {
    "chain_sum": (
        "The teacher is a frozen copy of the base. With a live teacher the reference condition "
        "collapsed on other bases of this kind; on the shipped base it does not within 40 updates.",
        "The budget and learning rate are fixed. At 1e-3, the best of four rates for each, the "
        "critique leads GRPO by 14 points and the reference by 3. This compares speed of learning, "
        "not where each condition ends.",
        "Most of the critique's lead over the reference is not its phrasing: its steps after the "
        "first error are judged on the attempt's own numbers. A critique that goes on from the "
        "corrected total does as well as a reference in the solver's own phrasing.",
        "The base matters: of five trained, three failed the gate (valid left sides at least 0.97, "
        "hint loss at most 0.09), and the shipped one was chosen among the two that passed. On an "
        "unhealthy base the order can break.",
        "The task is synthetic and the model has 0.24 M parameters, taught to use hints and to "
        "hold wrong beliefs; held-out questions share their 256 facts with the training questions.",
    ),
    "word_problems": (
        "The base was warmed up on purpose to write steps, use hints and hold wrong beliefs about "
        "25 of 55 digit sums; the gain measured is the repair of those beliefs.",
        "The budget is a few dozen updates; each condition's figure depends on its learning rate "
        "and on where in its transition the run stops.",
    ),
}


def limits_of(task: str | None) -> list[str]:
    """What must be said beside a result on this task; the general part only for your own data."""
    return [*TASK_LIMITS.get(task or "", ()), *GENERAL_LIMITS]


def summarise(
    children_results: Mapping[str, Sequence[EvalResult]],
    base_result: EvalResult,
    *,
    localisation: Mapping[str, Localisation] | None = None,
    task: str | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """The content of summary.json.

    children_results: condition -> final results, one per seed, on the questions of base_result
    (EvaluationError otherwise). "differences" maps "critique-grpo" and so on, and
    "<condition>-base", to the paired [mean, low, high] of Avg@k; "by_seed" are Avg@k.
    """
    conditions = {
        name: {
            "evals": [result.to_json() for result in results],
            "pooled": {metric: list(pooled_interval(results, metric)) for metric in METRICS},
            "by_seed": [result.avg_at_k for result in results],
        }
        for name, results in children_results.items()
    }
    pairs = [pair for pair in PAIRS if set(pair) <= set(children_results)]
    differences = {
        f"{first}-{second}": list(
            paired_difference(children_results[first], children_results[second])
        )
        for first, second in pairs
    }
    for name, results in children_results.items():
        differences[f"{name}-base"] = list(paired_difference(results, [base_result]))
    return {
        "base": base_result.to_json(),
        "conditions": conditions,
        "differences": differences,
        "localisation": {name: one.to_json() for name, one in (localisation or {}).items()},
        "limits": limits_of(task),
        "task": task,
        "seconds": seconds,
        "seeds": max((len(results) for results in children_results.values()), default=0),
    }


def percent(interval: Sequence[float]) -> str:
    """ "69.2 (64.1 to 74.0)" from fractions (mean, low, high)."""
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def points(interval: Sequence[float]) -> str:
    """ "+19.2 (+15.1 to +23.4)": a difference of shares, in percentage points."""
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def score_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Condition, three metrics with intervals, Avg@k by seed: one row for the base and each one."""
    base = summary["base"]
    intervals = ([base[metric], *base["intervals"][metric]] for metric in METRICS)
    rows = [["base", *map(percent, intervals), ""]]
    for name, one in summary["conditions"].items():
        seeds = " ".join(f"{100 * value:.1f}" for value in one["by_seed"])
        rows.append([name, *(percent(one["pooled"][metric]) for metric in METRICS), seeds])
    return rows


def score_headers(summary: Mapping[str, Any]) -> list[str]:
    k = summary["base"]["samples"]
    return ["condition", f"Avg@{k} %", f"pass@{k} %", f"maj@{k} %", f"Avg@{k} % by seed"]


LOCALISATION_HEADERS = [
    "teacher sees",
    "mean |A| before",
    "at",
    "after",
    "peak at",
    "share of |A| at + after",
    "of negative A at + after",
    "negative tokens, correct responses",
]


def localisation_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row per context, in the order of LOCALISATION_HEADERS; a dash: nothing was measured."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    def share(*parts: float | None) -> str:
        return "–" if None in parts else f"{100 * sum(p for p in parts if p is not None):.1f} %"

    rows = []
    for context, one in summary["localisation"].items():
        mean = [number(one["mean_abs"][key]) for key in ("before", "at", "after", "peak")]
        kinds = (one["share_abs"], one["share_negative"])
        shares = [share(kind["at"], kind["after"]) for kind in kinds]
        rows.append([context, *mean, *shares, share(one["negative_share_correct"])])
    return rows


def difference_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    return [[n.replace("-", " − "), points(value)] for n, value in summary["differences"].items()]


def console_table(summary: Mapping[str, Any]) -> Any:
    """A rich renderable: scores, paired differences, localisation, limits."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    base = summary["base"]
    k, questions = base["samples"], base["questions"]
    title = f"{questions} held-out questions × {k} samples, 95 % intervals"
    parts: list[Any] = [_table(title, score_headers(summary), score_rows(summary))]
    if summary["differences"]:
        headers = ["paired difference", f"Avg@{k}, points"]
        parts.append(_table("On the same questions", headers, difference_rows(summary)))
    if summary["localisation"]:
        title = "Where the teacher's advantage A = log T − log S falls: the first wrong step"
        parts.append(_table(title, LOCALISATION_HEADERS, localisation_rows(summary)))
    parts.append(Text("Limits", style="bold"))
    parts += [Padding(Text(f"• {limit}"), (0, 0, 0, 2)) for limit in summary["limits"]]
    return Group(*parts)


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if index else "left", overflow="fold")
    for row in rows:
        # Text, not str: names from folders are shown as they are, never as rich markup
        table.add_row(*map(Text, row))
    return table


def plain_table(summary: Mapping[str, Any], width: int = 120) -> str:
    """The same for a file or a pipe: text without colours or control codes."""
    from rich.console import Console

    sink = io.StringIO()
    console = Console(file=sink, width=width, color_system=None, force_terminal=False)
    console.print(console_table(summary))
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"
