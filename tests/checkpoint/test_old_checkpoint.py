"""A checkpoint that commit 4a8c3f7 wrote, before the code had rooms, is resumed as it was meant."""

from __future__ import annotations

import json
import shutil
import tomllib

import pytest
from places import DATA
from small_runs import losses, run_small

from fastsd.config import Config
from fastsd.config.load import PRESET
from fastsd.config.schema import deep_merge

FIXTURE = DATA / "checkpoint_4a8c3f7"


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """Settings name the model by a relative path, so the test runs where its copy is."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    settings = json.loads((FIXTURE / "settings.json").read_text()) | {"resume": "auto"}
    return Config(**deep_merge(tomllib.loads(PRESET.read_text()), settings))


def test_it_goes_on_with_the_samples_the_moments_and_the_average(config, tmp_path, monkeypatch):
    """The rollouts are the saved ones, so on any processor losses differ by fp32's rounding only:
    losses near 1 are means over some 70 tokens of sums over 25 terms, within 1e-5."""
    monkeypatch.setattr("fastsd.training.session.collect", lambda session: pytest.fail("collects"))
    run_dir = run_small(config, tmp_path / "old" / "run")
    want = json.loads((FIXTURE / "losses.json").read_text())
    found = dict(losses(run_dir))
    assert list(found) == [1, 2, 3]
    assert [found[step] for step in (2, 3)] == pytest.approx(want[1:], abs=1e-5)
