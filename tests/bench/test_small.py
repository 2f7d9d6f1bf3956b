"""The benches of guards, page, data sets, prefill and products: tiny runs, and what they count."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from browser import missing

from bench import bench_guards, bench_gym, bench_prefill, bench_products, bench_report
from fastsd.training.guards import SpikeRule


def rows_of(path, capsys) -> tuple[dict, list[dict]]:
    """The record that was saved, which is the last line printed, and its rows."""
    found = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    return found, found["rows"]


def test_guards(tmp_path, capsys):
    path = tmp_path / "guards.json"
    bench_guards.main(["--values", "3000", "--runs", "2", "--json", str(path)])
    _, rows = rows_of(path, capsys)
    kinds = ("false skips", "lasting shift", "collapse", "healthy", "collapsed", "noise")
    by_kind = {kind: [row for row in rows if row["what"] == kind] for kind in kinds}
    assert sum(map(len, by_kind.values())) == len(rows)
    assert [len(found) for found in by_kind.values()] == [7, 3, 40, 24, 3, 10]
    assert all(row["missed"] == row["early"] == 0 for row in by_kind["collapse"])
    assert all(row["alarm"] is None for row in by_kind["healthy"] + by_kind["noise"])
    assert all(row["alarm"] <= 10 for row in by_kind["collapsed"])
    assert all(1 <= row["skips"] <= 5 for row in by_kind["lasting shift"])


def test_skips_are_those_of_the_definition():
    """Windows in chunks; the rule in logarithms is the one that trains."""
    values = np.random.default_rng(1).lognormal(0, 0.5, 900)
    values[[300, 500, 501]] = 1e4
    want = [
        values[at] - (past := values[at - 128 : at]).mean() > 6 * past.std(ddof=1)
        for at in range(128, 900)
    ]
    assert sum(want) >= 1 and bench_guards.skips(values).tolist() == want
    rule = SpikeRule(128)
    decided = [rule.judge(6.0, value, None) for value in values.tolist()]
    assert bench_guards.skips(np.log(values), 0.01).tolist() == decided[128:]


def test_another_rule_than_the_trainers_is_not_reported(monkeypatch):
    monkeypatch.setattr(bench_guards, "SIGMA", 1.0)
    monkeypatch.setattr(SpikeRule, "judge", lambda self, sigma, norm, loss: False)
    with pytest.raises(RuntimeError, match="decides otherwise"):
        list(bench_guards.false_skips(1000))


def test_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    words = ["--rollouts", "2", "--tokens", "64", "--visits", "1", "--json", str(path)]
    bench_report.main(words)
    _, [row] = rows_of(path, capsys)
    assert 0 < row["response_bytes"] < row["bytes"] < 100_000
    if missing():
        assert row["why_not"] == missing()
    else:
        assert 0 < row["load_s"] <= row["ready_s"]


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs extra `data`")
def test_gym(tmp_path, capsys):
    path = tmp_path / "gym.json"
    names = ["gcd", "codeio"]
    words = ["--datasets", *names, "--questions", "2", "--skip-hash-seeds", "--json", str(path)]
    assert bench_gym.main(words) == 0
    found, [works, refused] = rows_of(path, capsys)
    assert (works["asked"], works["answers"], works["right"]) == (2, 2, 2)
    assert "executes program snippets" in refused["why_not"] and found["working"] == 1


def test_prefill_counts_what_is_shared(tmp_path, capsys):
    path = tmp_path / "prefill.json"
    sizes = ["--prompts", "4", "--instruction", "130", "--own", "20", "--rounds", "1"]
    bench_prefill.main(["--configuration", "tiny", *sizes, "--json", str(path)])
    _, rows = rows_of(path, capsys)
    # Two blocks of 64 are shared, the two tokens left over are not.
    assert [row["tokens"] for row in rows] == [128 + 4 * 22, 4 * 150, 4 * 150] * 2
    assert all(row["seconds"] > 0 and row["difference"] <= 1e-4 for row in rows)


def test_prefills_that_differ_are_not_reported(monkeypatch):
    outcomes = iter([torch.ones(3), torch.ones(3) * 1.1])
    monkeypatch.setattr(bench_prefill, "prefill", lambda policy, packs: next(outcomes))
    with pytest.raises(ArithmeticError, match="differ by 9"):
        bench_prefill.check(None, [(5, 6), (5, 7)])


def test_products(tmp_path, capsys):
    path = tmp_path / "products.json"
    bench_products.main(["--rounds", "1", "--scale", "16", "--json", str(path)])
    _, rows = rows_of(path, capsys)
    groups = [row["group"] for row in rows]
    assert {name: groups.count(name) for name in groups} == {
        "layer": 2 * 12, "head": 2, "decode": 2 * 12, "draw": 4,
    }  # fmt: skip
    for row in rows:
        assert row["ms"] > 0 and row["difference"] < (1e-2 if row["dtype"] == "bfloat16" else 1e-5)
        assert (row["gflop_per_s"] > 0) == (row["group"] != "draw")
