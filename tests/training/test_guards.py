"""Spikes and collapses are found, in time, and healthy runs are left alone."""

from __future__ import annotations

import json
import math
import random

import pytest
from metric_series import COLLAPSES, SERIES, alarms, collapse, healthy, lognormal, replay

from fastsd.config.sections import GuardConfig
from fastsd.training.guards import Guard, SpikeRule
from fastsd.training.statistics import repeated_share

# -- spikes ---------------------------------------------------------------------------------------


def test_at_most_one_false_skip_in_1e5():
    """Gaussian norms and log-normal losses, as skewed as real ones. The plain rule skips 19."""
    rng, rule = random.Random(0), SpikeRule(128)
    skewed = lognormal(100_000, 0.3)
    assert sum(rule.judge(6.0, rng.gauss(1.0, 0.1), loss) for loss in skewed) <= 1


@pytest.mark.parametrize("name", ["grad_norm", "loss"])
@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_a_spike_is_found_once_the_window_is_full(name, sigma):
    for filled, found in ((127, False), (128, True), (500, True)):
        rule = SpikeRule(128)
        for value in lognormal(filled, sigma):
            assert not rule.judge(6.0, value, value)
        high = math.exp(8 * sigma)
        values = (high, 1.0) if name == "grad_norm" else (1.0, high)
        assert rule.judge(6.0, *values) == found
        assert not rule.judge(6.0, 1.0, 1.0)


@pytest.mark.parametrize("factor", [8.0, 1e3, 1e9])
def test_a_lasting_shift_is_accepted_after_four_updates(factor):
    rule = SpikeRule(128)
    for value in lognormal(200, 0.2):
        rule.judge(6.0, value, None)
    skipped = [rule.judge(6.0, factor * value, None) for value in lognormal(300, 0.2, seed=1)]
    assert skipped[0] and sum(skipped) <= 4 and not any(skipped[4:])


def test_losses_of_either_sign_and_noise_below_one_percent_are_no_spikes():
    rule = SpikeRule(16)
    for index in range(40):
        assert not rule.judge(6.0, 1.0, -1e-9 if index % 10 == 0 else 1e-9)
    assert not rule.judge(6.0, 1.05, 1.0)
    assert rule.judge(6.0, 1.1, 1.0)
    assert not SpikeRule(16).judge(0.0, 1.0, 1.0)


def test_spike_sigma_zero_is_off_and_windows_go_on():
    rule, values = SpikeRule(16), lognormal(40, 0.1)
    assert not any(rule.judge(0.0, value, value) for value in [*values, 1e6])
    assert rule.state_json()["loss"][-1] == 1e6 and len(rule.state_json()["grad_norm"]) == 16


def test_the_state_restores_every_decision_and_fits_another_window():
    values = lognormal(300, 0.4)
    values[200] = values[260] = 1e3
    whole = Guard(GuardConfig(spike_sigma=3))
    want = [whole.is_spike(value, value) for value in values]
    assert any(want)
    for cut in (1, 127, 128, 201, 261):
        first, second = Guard(GuardConfig(spike_sigma=3)), Guard(GuardConfig(spike_sigma=3))
        got = [first.is_spike(value, value) for value in values[:cut]]
        second.load(json.loads(json.dumps(first.state_json())))
        assert got + [second.is_spike(value, value) for value in values[cut:]] == want
        assert second.state_json() == whole.state_json()
    shorter = SpikeRule(16)
    shorter.load(whole.state_json()["spikes"])
    assert shorter.state_json()["loss"] == values[-16:]


# -- collapse -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SERIES["healthy"]))
@pytest.mark.parametrize("rewards", [True, False])
def test_healthy_runs_raise_no_alarm(name, rewards):
    """Real runs of the embedded task: the nine, and at lr 1e-3, where entropy falls by two thirds
    as the policy becomes right. Without their rewards too."""
    series = dict(SERIES["healthy"][name])
    if not rewards:
        series["reward/mean"] = [None] * len(series["surprisal"])
    assert replay(series) is None


@pytest.mark.parametrize("name", sorted(SERIES["collapsed"]))
def test_real_collapses_are_found_within_10_updates(name):
    """lr 3e-2: the first update breaks the policy; a start of 8 updates would be too long."""
    step, _ = replay(SERIES["collapsed"][name])
    assert step <= 10


def test_no_healthy_run_of_the_embedded_task_has_a_spike():
    for series in SERIES["healthy"].values():
        rule = SpikeRule(32)
        for norm, loss in zip(series["grad_norm"], series["loss"], strict=True):
            assert not rule.judge(6.0, norm, loss)


@pytest.mark.parametrize("reward", ["falls", "constant"])
@pytest.mark.parametrize("ramp", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("sign", sorted(COLLAPSES))
def test_scripted_collapses_are_found_within_20_updates(sign, ramp, reward):
    for seed in range(20):
        for start in (3, 10, 60):
            series = collapse(healthy(100, seed), sign, start, ramp, reward)
            step, signs = replay(series, rollouts=32)
            assert start <= step <= start + 19 + (start == 3) and sign in signs


@pytest.mark.parametrize("sign", ["length", "truncation", "repetition"])
def test_without_rewards_the_signs_stand_alone_but_for_entropy(sign):
    nothing = [None] * 100
    alone = collapse(healthy(100, 0), sign, 30, 5, "falls") | {"reward/mean": nothing}
    assert 30 <= replay(alone)[0] <= 40
    sure = collapse(healthy(100, 0), "entropy", 30, 5, "falls") | {"reward/mean": nothing}
    assert replay(sure) is None
    both = sure | {name: alone[name] for name in COLLAPSES[sign]}
    assert "entropy" in [one for _, signs in alarms(both) for one in signs]


@pytest.mark.parametrize("rewards", ["rising", "high all along"])
def test_learning_is_no_collapse(rewards):
    """Answers ten times shorter and entropy gone: fine with rewards like these."""
    ends = {"length/mean": 40, "surprisal": 0.005, "reward/mean": 0.8}
    series = healthy(200, 0)
    for name, end in ends.items():
        for index in range(20, 200):
            share = min(1.0, (index - 19) / 60)
            series[name][index] += share * (end - series[name][index])
    if rewards == "high all along":
        assert replay(series | {"reward/mean": [0.85] * 200}) is not None
        series["reward/mean"] = [0.95] * 200
    assert replay(series) is None


def test_healthy_noise_raises_no_alarm():
    assert all(replay(healthy(1000, seed), rollouts=32) is None for seed in range(10))


def test_short_or_certain_from_the_start_is_no_collapse():
    for name, before, after in (
        ("length/mean", 3.0, 1.6),
        ("surprisal", 0.015, 0.0001),
        ("length/repetition", 0.9, 0.94),
        ("length/truncated_share", 0.9, 0.97),
    ):
        series = healthy(60, 0)
        series[name] = [before] * 8 + [after] * 52
        assert replay(series) is None


def test_repeated_share():
    assert repeated_share([7] * 2048) > 0.999
    assert repeated_share(list(range(50))) == 0.0 == repeated_share([1, 1, 1])
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([1, 1, 1, 1]) == 0.0
