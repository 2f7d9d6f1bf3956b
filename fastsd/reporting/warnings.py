"""What a reader of the page must know before trusting it: signs of collapse, and what was left out.

Collapse never shows in the loss. Each sign compares the last tenth of a run's updates (five at
least) with its first: lengths that run away or vanish, entropy that is gone, responses that repeat
themselves or never stop, a critic that fails, rollouts that taught nothing. Entropy falls in every
run that learns, so it warns with a reward that did not rise only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastsd.records.folder import read_metrics
from fastsd.reporting.comparison import labelled
from fastsd.reporting.runs import Run

ENTROPY_LEFT = 0.1  # of the entropy at the start
LENGTH_LEFT = 0.2  # of the length at the start
NEAR_LIMIT = 0.95  # of rollout.max_new_tokens
TRUNCATED = 0.5
REPEATED = 0.5  # share of repeated 4-grams
SHARE = 0.1  # of rollouts that were dropped, cut or not scored
PROBLEM = "feedback/problem/"
ALARM = "guard/collapse_"

Lines = Sequence[Mapping[str, Any]]


def warnings_of(runs: Mapping[str, Run]) -> list[tuple[str, list[str]]]:
    """(run's label, what is wrong) for every seed of every condition that has something."""
    found = []
    for run, one in runs.items():
        limit = one.config.get("rollout", {}).get("max_new_tokens")
        if notes := template_notes(one.config.get("prompt", {})):
            found.append((run, notes))
        for path in (path for paths in one.children.values() for path in paths):
            lines = read_metrics(path)
            said = [*collapse_signs(lines, limit), *left_out(lines)]
            if said:
                name = path.name if path != one.folder else run or path.name
                found.append((name if name == run else labelled(run, name), said))
    return found


def template_notes(prompt: Mapping[str, Any]) -> list[str]:
    """Where the teacher's chat template is given other arguments than the student's."""
    student, teacher = (
        prompt.get(f"{role}_template_kwargs", {}) for role in ("student", "teacher")
    )
    names = sorted(
        name for name in {**student, **teacher} if student.get(name) != teacher.get(name)
    )
    return [
        f"chat template: {name} is {student.get(name, 'unset')} for the student and "
        f"{teacher.get(name, 'unset')} for the teacher, whose first tokens may be another format’s"
        for name in names
    ]


def collapse_signs(lines: Lines, max_new_tokens: int | None) -> list[str]:
    """Signs of collapse at the end of a run, in words."""
    signs = []
    start, end = _ends(lines, "length/mean")
    if end is not None and start is not None:
        if end <= LENGTH_LEFT * start:
            signs.append(f"responses shrank from {start:.0f} to {end:.1f} tokens")
        if max_new_tokens and start < NEAR_LIMIT * max_new_tokens <= end:
            signs.append(f"responses grew from {start:.0f} to {end:.0f} of {max_new_tokens} tokens")
    _, truncated = _ends(lines, "length/truncated_share")
    if truncated is not None and truncated >= TRUNCATED:
        signs.append(f"{truncated:.0%} of the responses never stopped")
    _, repeated = _ends(lines, "length/repetition")
    if repeated is not None and repeated >= REPEATED:
        signs.append(f"responses repeat themselves ({repeated:.0%} of their 4-grams)")
    start, end = _ends(lines, "entropy/mean")
    if start is not None and end is not None and end < ENTROPY_LEFT * start:
        before, after = _ends(lines, "reward/mean")
        if before is None or after is None or after <= before:
            signs.append(f"entropy fell from {start:.3f} to {end:.4f} and the reward did not rise")
    return signs


def left_out(lines: Lines) -> list[str]:
    """What failed or was dropped, in words."""
    said = []
    if bad := sum(line.get("non_finite", 0) for line in lines):
        said.append(f"{bad} metric values were not finite numbers")
    if skipped := sum(line.get("skipped") or 0 for line in lines):
        said.append(f"{skipped:.0f} of {len(lines)} updates were skipped by a guard")
    if alarms := _totals(lines, ALARM):
        said.append(f"the guard saw signs of collapse: {', '.join(sorted(alarms))}")
    if problems := _totals(lines, PROBLEM):
        classes = ", ".join(f"{name} {count:.0f}" for name, count in sorted(problems.items()))
        said.append(f"critiques without use: {classes}")
    shares = {
        "feedback/dropped_share": "were dropped for their feedback",
        "feedback/cut_share": "had feedback that did not fit",
        "reward/missing_share": "were not scored",
    }
    for name, what in shares.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        mean = math.fsum(values) / len(values) if values else 0.0
        if mean > SHARE:
            said.append(f"{mean:.0%} of the rollouts {what}")
    return said


def _totals(lines: Lines, prefix: str) -> dict[str, float]:
    """Sums over the run of the metrics whose names begin so, by the rest of the name."""
    totals: dict[str, float] = {}
    for line in lines:
        for name, count in line.items():
            if name.startswith(prefix) and count:
                kind = name.removeprefix(prefix)
                totals[kind] = totals.get(kind, 0.0) + count
    return totals


def _ends(lines: Lines, name: str) -> tuple[float | None, float | None]:
    """The metric's mean over the first and the last tenth of the updates that have it; None each
    where there are fewer than ten."""
    values = [line[name] for line in lines if line.get(name) is not None]
    if len(values) < 10:
        return None, None
    tenth = max(5, len(values) // 10)
    return math.fsum(values[:tenth]) / tenth, math.fsum(values[-tenth:]) / tenth
