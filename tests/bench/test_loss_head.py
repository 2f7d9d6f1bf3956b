"""The loss head's bench: one JSON line at its end, nothing on a red gate, its modes, its plot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from places import ROOT

from bench import bench_loss_head, plot_loss_head


def test_bench_ends_with_one_json_line(tmp_path):
    path = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_loss_head", "--skip-tests",
         "--shapes", "21x16x130,9x16x130", "--rounds", "2", "--threads", "1",
         "--impls", "chunked,eager,cce", "--ops", "reverse_kl,cross_entropy", "--json", str(path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(path.read_text())
    assert found["tests"] == "skipped" and found["mode"] == "time"
    assert found["script"] == "bench/bench_loss_head.py" and found["hardware"]
    assert found["versions"]["torch"] == torch.__version__ and found["commit"]
    assert len(found["rows"]) == 2 * 2 * 4 and {row["threads"] for row in found["rows"]} == {1}
    assert done.stdout.count("not run: cce") == 1
    out = tmp_path / "folder" / "plot"
    assert plot_loss_head.main([str(path), "--out", str(out)]) == 0
    assert found["commit"] in (tmp_path / "folder" / "plot.svg").read_text()
    assert (tmp_path / "folder" / "plot.png").stat().st_size > 10_000


def test_nothing_is_measured_when_the_tests_fail(monkeypatch, capsys):
    monkeypatch.setattr(bench_loss_head, "run_tests", lambda: "failed")
    monkeypatch.setattr(bench_loss_head, "in_process", lambda *_: pytest.fail("measured"))
    assert bench_loss_head.main(["--shapes", "2x3x4"]) == 1
    captured = capsys.readouterr()
    assert "nothing was measured" in captured.err and not captured.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ops", "reverse_kl,kl"], "--ops.*'kl'"),
        (["--impls", "fastest"], "--impls.*'fastest'"),
        (["--shapes", "512x576"], "--shapes.*TxDxV"),
        (["--scaling", "--shapes", "2x3x4,3x3x4"], "take one"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_loss_head.main(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_scaling_and_accuracy(capsys):
    common = ["--threads", "1", "--rounds", "1", "--impls", "chunked", "--worker", os.devnull]
    found = bench_loss_head.parse(["--scaling", "--shapes", "32x16x256", *common])
    assert len(bench_loss_head.work(found)) == 3 * len(bench_loss_head.SCALES)
    assert capsys.readouterr().out.count("R^2") == 3
    found = bench_loss_head.parse(["--accuracy", "--shapes", "16x16x64", "--ops", "jsd", *common])
    rows = bench_loss_head.work(found)
    assert [(row["dtype"], row["logit_scale"]) for row in rows] == [
        ("bfloat16", 1.0), ("float32", 1.0), ("float32", 8.0),
    ]  # fmt: skip
    assert all("seconds" not in row and row["errors"] for row in rows)


def test_a_plot_needs_two_values_of_t():
    row = {"op": "jsd", "threads": 1, "seconds": 1.0, "shape": [4, 2, 3], "contestant": "floor"}
    with pytest.raises(ValueError, match="two values of T"):
        plot_loss_head.by_contestant([row, row], "jsd", 1)
    other = {**row, "shape": [2, 2, 3]}
    assert plot_loss_head.by_contestant([row, other], "jsd", 1) == {"floor": [other, row]}
