"""Runs as the guards see them: recorded, healthy by chance, and scripted collapses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from fastsd.training.guards import CollapseAlarm

DATA = Path(__file__).parents[1] / "data"
SERIES = json.loads((DATA / "metric_series.json").read_text())


def lognormal(count, sigma, seed=0):
    rng = random.Random(seed)
    return [rng.lognormvariate(0.0, sigma) for _ in range(count)]


def alarms(series, rollouts=128):
    """(step, signs) of all updates at which something is on."""
    alarm, found = CollapseAlarm(), []
    for step, values in enumerate(zip(*series.values(), strict=True), 1):
        row = dict(zip(series, values, strict=True))
        alarm.observe(step, {n: math.nan if v is None else v for n, v in row.items()}, rollouts)
        if alarm.alarms:
            found.append((step, alarm.alarms))
    return found


def replay(series, rollouts=128):
    """The first of `alarms`; None where nothing ever is on."""
    return next(iter(alarms(series, rollouts)), None)


def healthy(steps, seed, reward=0.3):
    """A made-up run in good health that learns nothing, noisier than real ones."""
    rng = random.Random(seed)
    return {
        "length/mean": [400 * rng.lognormvariate(0, 0.15) for _ in range(steps)],
        "length/truncated_share": [rng.uniform(0, 0.2) for _ in range(steps)],
        "surprisal": [0.4 * rng.lognormvariate(0, 0.15) for _ in range(steps)],
        "length/repetition": [rng.uniform(0.05, 0.25) for _ in range(steps)],
        "reward/mean": [min(1.0, max(0.0, rng.gauss(reward, 0.1))) for _ in range(steps)],
    }


COLLAPSES = {
    "length": {"length/mean": 1.0},
    "truncation": {"length/mean": 2048.0, "length/truncated_share": 1.0},
    "entropy": {"surprisal": 0.0},
    "repetition": {"length/repetition": 1.0},
}


def collapse(series, sign, start, ramp, reward):
    """The series with a straight ramp to the collapsed values from step `start` on (from 1)."""
    ends = dict(COLLAPSES[sign])
    if reward == "falls":
        ends["reward/mean"] = 0.0
    out = {name: list(values) for name, values in series.items()}
    if reward == "constant":
        out["reward/mean"] = [0.3] * len(out["reward/mean"])
    for name, end in ends.items():
        for index in range(start - 1, len(out[name])):
            share = min(1.0, (index - start + 2) / ramp)
            out[name][index] += share * (end - out[name][index])
    return out
