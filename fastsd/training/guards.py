"""What tells that a run has gone wrong although every number is finite: spikes and collapse.

**Spikes.** OLMo's rule (arXiv 2501.00656): an update is skipped whose gradient norm or loss lies
more than `spike_sigma` standard deviations (of a sample, n - 1) above the mean of the last
`spike_window` values. The spike itself enters the window, so that a lasting shift of the level is
accepted after 4 of 128 updates, rarely 5, however large. Ours is taken in logarithms: norms are
right-skewed (log-normal with sigma 0.3 passes 6 sigma of the plain rule 19 times in 10^5 healthy
updates, in logarithms never), and it waits for a full window, OLMo for half of one. A loss is
judged only where it and its window are positive, as divergences are: the policy term is a sum of
advantages, near zero with rare outliers whatever its gradient does.

**Collapse.** The loss never signals it; four signs do, each shown three updates in a row. They are
measured against the run's own start, the updates until 64 rollouts were seen: a learning rate far
too high breaks the policy with its second update, and a longer start would hold the wreck:

    length      below a fifth of its start (or 2 tokens where it started above 4)
    truncation  three quarters of the way from its start to 1
    entropy     below a fifth of its start, where that was above 0.02 nats
    repetition  halfway from its start to 1 (share of repeated 4-grams)

Learning shortens answers and lowers entropy too, and that is no collapse. What tells them apart is
the reward: no sign counts while the mean of its last 5 values lies two standard errors (and 0.01)
above that of its first 8, or is at 0.9 of at most 1. Without rewards (distillation alone) entropy
needs the company of another sign, at a laxer threshold. Entropy is taken as the surprisal of the
sampled tokens: an unbiased estimate over all rollouts, where entropy/mean covers the trained ones.

All of it is a function of the metrics and part of the checkpoint, so a resume is exact. It is kept
up to date with guard.collapse = "off" too: the settings may change between a stop and a resume.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastsd.config.sections import GuardConfig
from fastsd.errors import TrainingDiverged
from fastsd.types import StepMetrics

IN_A_ROW = 3
_START_ROLLOUTS = 64
_START_REWARDS = 8
_RECENT = 5
# Six of these are 6 %: what varies less than this is constant, and 6 % more is no spike.
_LEAST_SPREAD = 0.01

# Sign -> the metric that shows it.
SIGNS = {
    "length": "length/mean",
    "truncation": "length/truncated_share",
    "entropy": "surprisal",
    "repetition": "length/repetition",
}


class Collapsed(TrainingDiverged):
    """guard.collapse = "stop": the policy has stopped answering. The last update is on record."""


class Guard:
    """The spike rule and the collapse alarms of one run."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self._spikes = SpikeRule(config.spike_window)
        self._collapse = CollapseAlarm()
        self._warnings: list[str] = []

    def is_spike(self, grad_norm: float, loss: float | None) -> bool:
        """Whether this update must be skipped. Call it once for each update with a signal."""
        return self._spikes.judge(self.config.spike_sigma, grad_norm, loss)

    def observe(self, step: int, metrics: StepMetrics, rollouts: int) -> StepMetrics:
        """Takes note of an update's metrics, which are those of so many rollouts. Returns
        guard/collapse_SIGN: 1.0 while it is on, else 0.0; nothing with "off"."""
        self._collapse.observe(step, metrics, rollouts)
        if self.config.collapse == "off":
            return {}
        if self.config.collapse == "warn":
            self._warnings += self._collapse.news()
        alarms = self._collapse.alarms
        return {f"guard/collapse_{sign}": float(sign in alarms) for sign in SIGNS}

    def warnings(self) -> list[str]:
        """With "warn": lines not yet printed, one for each sign in the life of a run."""
        lines, self._warnings = self._warnings, []
        return lines

    def check(self) -> None:
        """With "stop": raises Collapsed while a sign is on."""
        if self.config.collapse == "stop" and self._collapse.alarms:
            signs = "; ".join(self._collapse.describe(sign) for sign in self._collapse.alarms)
            raise Collapsed(
                f"{signs}. Look at the newest file in completions/. The run is saved as of this "
                "update: go on with --resume auto --guard.collapse warn, or start again with a "
                "lower optim.lr"
            )

    def state_json(self) -> dict[str, Any]:
        return {"spikes": self._spikes.state_json(), "collapse": self._collapse.state_json()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_json` gave; a shorter window keeps the newest values."""
        self._spikes.load(state["spikes"])
        self._collapse.load(state["collapse"])


class SpikeRule:
    """The last `window` gradient norms and losses, and whether the next ones stand out."""

    def __init__(self, window: int):
        self.window = window
        self._values: dict[str, list[float]] = {"grad_norm": [], "loss": []}

    def judge(self, sigma: float, grad_norm: float, loss: float | None) -> bool:
        """Judges finite values against those before them, then adds them. sigma 0: never true."""
        found = False
        for name, value in (("grad_norm", grad_norm), ("loss", loss)):
            past = self._values[name]
            if value is None:
                continue
            full = len(past) >= self.window
            found |= sigma > 0 and full and _stands_out(past, value, sigma)
            self._values[name] = [*past, value][-self.window :]
        return found

    def state_json(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._values.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        self._values = {name: list(state[name])[-self.window :] for name in self._values}


def _stands_out(past: Sequence[float], value: float, sigma: float) -> bool:
    if value <= 0 or min(past) <= 0:
        return False
    logs = [math.log(one) for one in past]
    spread = math.sqrt(_squares(logs) / (len(logs) - 1))
    return math.log(value) - _mean(logs) > sigma * max(spread, _LEAST_SPREAD)


class CollapseAlarm:
    """The signs of collapse, against the start of the run."""

    def __init__(self) -> None:
        self._start: list[dict[str, float]] = []
        self._start_rollouts = 0
        self._recent: list[dict[str, float]] = []
        self._rewards: list[float] = []
        self._recent_rewards: list[float] = []
        self._in_a_row = dict.fromkeys(SIGNS, 0)
        self._reported: list[str] = []
        self._step = 0

    def observe(self, step: int, metrics: StepMetrics, rollouts: int) -> None:
        """One update's metrics; those of SIGNS must be there, reward/mean may be missing or nan."""
        self._step = step
        reward = metrics.get("reward/mean", math.nan)
        rewards = [] if math.isnan(reward) else [reward]
        self._rewards = [*self._rewards, *rewards][:_START_REWARDS]
        self._recent_rewards = [*self._recent_rewards, *rewards][-_RECENT:]
        seen = {sign: metrics[name] for sign, name in SIGNS.items()}
        self._recent = [*self._recent, seen][-IN_A_ROW:]
        if self._start_rollouts < _START_ROLLOUTS:
            self._start.append(seen)
            self._start_rollouts += rollouts
            return
        shown = [] if self._learns() else self._signs(seen)
        for sign in SIGNS:
            self._in_a_row[sign] = self._in_a_row[sign] + 1 if sign in shown else 0

    @property
    def alarms(self) -> list[str]:
        """Signs that have been there for three updates or more."""
        return [sign for sign in SIGNS if self._in_a_row[sign] >= IN_A_ROW]

    def news(self) -> list[str]:
        """Descriptions of the alarms that this has not returned before."""
        fresh = [sign for sign in self.alarms if sign not in self._reported]
        self._reported += fresh
        return [self.describe(sign) for sign in fresh]

    def describe(self, sign: str) -> str:
        """The sign with its values, its start, and the reward's."""
        values = ", ".join(f"{seen[sign]:.3g}" for seen in self._recent)
        rewards = self._recent_rewards, self._rewards
        now, before = (f"{_mean(values):.3g}" if values else "none" for values in rewards)
        return (
            f"sign of collapse, {sign}: {SIGNS[sign]} was {values} in updates "
            f"{self._step - IN_A_ROW + 1} to {self._step} and {self._mean_start(sign):.3g} at the "
            f"start; reward {now}, {before} then"
        )

    def state_json(self) -> dict[str, Any]:
        return {name.removeprefix("_"): copy.deepcopy(value) for name, value in vars(self).items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, copy.deepcopy(state[name.removeprefix("_")]))

    def _mean_start(self, sign: str) -> float:
        return _mean([seen[sign] for seen in self._start])

    def _learns(self) -> bool:
        """Whether the reward is clearly above its start, or at its ceiling."""
        now, before = self._recent_rewards, self._rewards
        if not now:
            return False
        if _mean(now) >= 0.9 and max(*now, *before) <= 1.0:
            return True
        freedom = max(1, len(now) + len(before) - 2)
        variance = (_squares(now) + _squares(before)) / freedom
        error = math.sqrt(variance * (1 / len(now) + 1 / len(before)))
        return _mean(now) - _mean(before) > max(2 * error, 0.01)

    def _signs(self, now: Mapping[str, float]) -> list[str]:
        """The signs that an update shows."""
        start = {sign: self._mean_start(sign) for sign in SIGNS}

        def risen(sign: str, share: float) -> bool:
            return now[sign] > start[sign] + share * (1 - start[sign])

        certain = start["entropy"] > 0.02 and now["entropy"] < 0.2 * start["entropy"]
        if certain and not self._rewards:
            length_changed = not 0.5 <= now["length"] / start["length"] <= 2.0
            certain = length_changed or risen("truncation", 0.25) or risen("repetition", 0.25)
        shortest = max(0.2 * start["length"], min(2.0, start["length"] / 2))
        shown = {
            "length": now["length"] < shortest,
            "truncation": risen("truncation", 0.75),
            "entropy": certain,
            "repetition": risen("repetition", 0.5),
        }
        return [sign for sign, is_shown in shown.items() if is_shown]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _squares(values: Sequence[float]) -> float:
    """Sum of squared deviations from the mean."""
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values)
