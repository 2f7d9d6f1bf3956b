"""What the guards let pass and what they find: false skips of spikes, collapses, healthy runs.

    python -m bench.bench_guards [--values 4000000] [--runs 400] [--json PATH]

Healthy values are drawn from seven distributions, and each rule counts the updates that it would
skip, in 10^5: OLMo's, six standard deviations above the mean of the last 128 values, and ours, the
same in logarithms. Both are computed for all windows at once; on the first values ours must decide
as `fastsd.training.guards.SpikeRule` does, or nothing is reported. Scripted collapses, healthy
noise and the recorded runs are those of tests/helpers/metric_series.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from bench.common import measure
from fastsd.training.guards import SpikeRule
from tests.helpers.metric_series import COLLAPSES, SERIES, collapse, healthy, lognormal, replay

SCRIPT = "bench/bench_guards.py"
WINDOW, SIGMA, LEAST_SPREAD = 128, 6.0, 0.01
CHECKED, CHUNK = 20_000, 1 << 18
DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal (1, 0.1)": lambda draw, n: draw.normal(1, 0.1, n),
    "log-normal (0.3)": lambda draw, n: draw.lognormal(0, 0.3, n),
    "log-normal (0.6)": lambda draw, n: draw.lognormal(0, 0.6, n),
    "gamma (4)": lambda draw, n: draw.gamma(4, 1, n),
    "chi (8)": lambda draw, n: np.sqrt(draw.chisquare(8, n)),
    "exp of Laplace (0.3)": lambda draw, n: np.exp(draw.laplace(0, 0.3, n)),
    "exp of Student t 5 (0.3)": lambda draw, n: np.exp(0.3 * draw.standard_t(5, n)),
}
STARTS, RAMPS, REWARDS = (3, 10, 60), (1, 2, 5, 10, 20), ("falls", "constant")


def skips(values: np.ndarray, least: float = 0.0) -> np.ndarray:
    """Whether each value from the WINDOW-th on stands out from the WINDOW values before it."""
    past = sliding_window_view(values, WINDOW)[:-1]
    found = [
        values[WINDOW + at : WINDOW + at + CHUNK] - part.mean(1)
        > SIGMA * np.maximum(part.std(1, ddof=1), least)
        for at in range(0, len(past), CHUNK)
        for part in [past[at : at + CHUNK]]
    ]
    return np.concatenate(found)


def false_skips(count: int) -> Iterator[dict]:
    for name, sample in DRAWS.items():
        values = sample(np.random.default_rng(0), count)
        ours, rule = skips(np.log(values), LEAST_SPREAD), SpikeRule(WINDOW)
        decided = [rule.judge(SIGMA, value, None) for value in values[:CHECKED].tolist()]
        if decided[WINDOW:] != ours[: len(decided) - WINDOW].tolist():
            raise RuntimeError(f"{name}: the rule of fastsd.training.guards decides otherwise")
        counted = {"plain": skips(values), "ours": ours}
        yield {"what": "false skips", "case": name, "values": count} | {
            f"{rule}_in_1e5": 1e5 * float(found.mean()) for rule, found in counted.items()
        }


def lasting_shifts(runs: int) -> Iterator[dict]:
    """The most updates skipped after the level of a log-normal norm has changed for good."""
    for factor in (8.0, 1e3, 1e9):
        counts = []
        for seed in range(runs):
            rule = SpikeRule(WINDOW)
            for value in lognormal(200, 0.2, seed):
                rule.judge(SIGMA, value, None)
            later = lognormal(2 * WINDOW, 0.2, runs + seed)
            counts.append(sum(rule.judge(SIGMA, factor * value, None) for value in later))
        yield {"what": "lasting shift", "case": f"x {factor:g}", "runs": runs, "skips": max(counts)}


def scripted(runs: int) -> Iterator[dict]:
    """Updates from a collapse's beginning to the alarm, the most over `runs` made-up runs."""
    for sign in COLLAPSES:
        for ramp in RAMPS:
            for reward in REWARDS:
                found = []
                for seed in range(runs):
                    start = STARTS[seed % len(STARTS)]
                    alarm = replay(collapse(healthy(100, seed), sign, start, ramp, reward), 32)
                    found.append(None if alarm is None else alarm[0] - start + 1)
                seen = [one for one in found if one is not None]
                yield {"what": "collapse", "case": f"{sign}, ramp {ramp}, reward {reward}",
                       "runs": runs, "missed": found.count(None), "early": sum(n < 1 for n in seen),
                       "updates": max(seen, default=None)}  # fmt: skip


def recorded() -> Iterator[dict]:
    """The embedded task's real runs, and made-up noise: updates, and the first alarm's, if any."""
    for kind in SERIES:
        for name, series in SERIES[kind].items():
            silent = series | {"reward/mean": [None] * len(series["surprisal"])}
            for rewards, values in ((True, series), (False, silent)):
                if rewards or kind == "healthy":
                    yield _watched(kind, name + (not rewards) * ", no rewards", values, 128)
    for seed in range(10):
        yield _watched("noise", f"seed {seed}", healthy(1000, seed), 32)


def _watched(what: str, case: str, series: dict, rollouts: int) -> dict:
    alarm = replay(series, rollouts)
    return {"what": what, "case": case, "updates": len(series["surprisal"]),
            "alarm": None if alarm is None else alarm[0]}  # fmt: skip


def line(row: dict) -> str:
    named = ((k, f"{v:.3g}" if isinstance(v, float) else v) for k, v in row.items())
    cells = [str(v) if k in ("what", "case") else f"{k} {v}" for k, v in named]
    return "| " + " | ".join(cells) + " |"


def summary(rows: Sequence[dict]) -> Iterator[str]:
    for kind in ("healthy", "noise", "collapsed"):
        some = [row for row in rows if row["what"] == kind]
        alarms = [row["alarm"] for row in some if row["alarm"] is not None]
        yield f"{kind}: {sum(row['updates'] for row in some):,} updates, alarms at {alarms}"
    some = [row for row in rows if row["what"] == "collapse"]
    abrupt = max(row["updates"] or 0 for row in some if ", ramp 1," in row["case"])
    worst, missed = max(row["updates"] or 0 for row in some), sum(row["missed"] for row in some)
    yield f"scripted collapses: {missed} missed, found within {worst} updates, abrupt {abrupt}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--values", type=int, default=4_000_000)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    rows, runs = [], arguments.runs
    for found in false_skips(arguments.values), lasting_shifts(runs), scripted(runs), recorded():
        for row in found:
            rows.append(row)
            print(line(row), flush=True)
    print("\n".join(summary(rows)))
    words = sys.argv[1:] if argv is None else list(argv)
    measure.write(measure.record(SCRIPT, torch.device("cpu"), rows, words), arguments.json)


if __name__ == "__main__":
    main()
