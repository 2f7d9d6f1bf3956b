"""Trackers: each read back from what it wrote, resumed, broken, without network or secrets."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import time

import pytest
from places import ROOT
from small_runs import run_small, small_config

import fastsd.records.trackers
from fastsd.config.sections import LogConfig
from fastsd.errors import FastsdError
from fastsd.records.trackers import open_trackers

STEPS = {1: {"loss": 0.5, "reward/mean": 0.25}, 2: {"loss": 0.25, "reward/mean": 0.5}}
SECRETS = {
    "WANDB_API_KEY": "a1b2c3d4e5" * 4,
    "OPENAI_API_KEY": "sk-planted-key",
    "HF_TOKEN": "hf_x",
}


@pytest.fixture
def trackio_db(tmp_path, monkeypatch):
    """trackio's folder is fixed when it is imported."""
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path / "trackio" / "proj.db"


def write(kind, run_dir, steps, done=0):
    [tracker] = open_trackers(LogConfig(trackers=[kind], project="proj"), run_dir, "run", done)
    for step, metrics in steps.items():
        tracker.log(step, metrics | {"broken": float("nan")})
    tracker.close()


def read_tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    found: dict[int, dict] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found.setdefault(event.step, {})
            found[event.step][name] = event.value
    return found


def read_trackio(database):
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics, run_name FROM metrics").fetchall()
    assert len({step for step, *_ in rows}) == len(rows)
    assert {name for *_, name in rows} == {f"{database.parent.parent.name}/run"}
    return {step: json.loads(metrics) for step, metrics, _ in rows}


def wandb_records(path):
    """Its log is LevelDB's: a header of 7 bytes, then records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + length > len(content):
            break  # still being written
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def read_wandb(run_dir):
    found: dict[int, dict] = {}
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("run"):
                assert record.run.display_name == f"{run_dir.parent.name}/run"
            if record.HasField("history"):
                items = {
                    (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
                    for item in record.history.item
                }
                ours = {name: value for name, value in items.items() if name[0] != "_"}
                found[record.history.step.num or items["_step"]] = ours
    return found


def eventually(read, want):
    """What is read once it is `want`, or after 10 s: wandb's process closes its file by itself."""
    deadline = time.monotonic() + 10
    while (found := read()) != want and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb"])
def test_what_was_written_is_read_back_and_a_resume_appends(kind, tmp_path, trackio_db):
    pytest.importorskip(kind)
    run_dir = tmp_path / "run"
    read = {
        "tensorboard": lambda: read_tensorboard(run_dir),
        "trackio": lambda: read_trackio(trackio_db),
        "wandb": lambda: read_wandb(run_dir),
    }[kind]
    write(kind, run_dir, STEPS)
    assert eventually(read, STEPS) == STEPS
    again = {2: STEPS[2], 3: {"loss": 0.125, "reward/mean": 1.0}}
    write(kind, run_dir, again, done=1)
    assert eventually(read, STEPS | again) == STEPS | again


@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named_before_anything_is_written(kind, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == kind else find(name)
    )
    with pytest.raises(FastsdError, match=rf'"{kind}" is not.*pip install .fastsd\[trackers\]'):
        open_trackers(LogConfig(trackers=[kind]), tmp_path / "run", "run")
    assert not (tmp_path / "run").exists()


def test_one_that_cannot_start_is_an_error_and_closes_the_others(tmp_path, monkeypatch):
    closed = []

    class Good:
        def __init__(self, *_):
            pass

        def close(self):
            closed.append(1)

    def bad(*_):
        raise ValueError("no such project")

    monkeypatch.setattr(fastsd.records.trackers, "require_packages", lambda config: None)
    monkeypatch.setattr(fastsd.records.trackers, "_KINDS", {"tensorboard": Good, "trackio": bad})
    with pytest.raises(FastsdError, match="trackio cannot start: ValueError: no such project"):
        open_trackers(LogConfig(trackers=["tensorboard", "trackio"]), tmp_path, "run")
    assert closed == [1]


class Failing:
    """Breaks at the second update."""

    logged: list[int] = []

    def __init__(self, *_):
        pass

    def log(self, step, metrics):
        self.logged.append(step)
        if step == 2:
            raise OSError("disk gone")

    def close(self):
        raise AssertionError("closed after it failed")


def test_one_that_fails_says_so_once_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastsd.records.trackers, "require_packages", lambda config: None)
    monkeypatch.setattr(fastsd.records.trackers, "_KINDS", {"tensorboard": Failing})
    monkeypatch.setattr(Failing, "logged", [])
    config = small_config("grpo", optim={"steps": 4}, log={"trackers": ["tensorboard"]})
    run = run_small(config, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and Failing.logged == [1, 2]
    assert capsys.readouterr().out.count("tensorboard failed") == 1


def test_a_run_without_trackers_leaves_no_trace_of_them(tmp_path):
    assert open_trackers(LogConfig(), tmp_path / "run", "run") == []
    assert not (tmp_path / "run").exists()


ALL_THREE = """
import sys
from pathlib import Path
from fastsd.config.sections import LogConfig
from fastsd.records.trackers import open_trackers
kinds = ["tensorboard", "trackio", "wandb"]
trackers = open_trackers(LogConfig(trackers=kinds), Path(sys.argv[1]), "run")
for step in range(1, 4):
    for tracker in trackers:
        tracker.log(step, {"loss": 1.0 / step})
for tracker in trackers:
    tracker.close()
print("closed")
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_nothing_asks_the_network_and_no_secret_is_written(tmp_path):
    for kind in ("tensorboard", "trackio", "wandb"):
        pytest.importorskip(kind)
    trace = tmp_path / "trace"
    names = {"TRACKIO_SPACE_ID": "someone/space", "TRACKIO_DIR": str(tmp_path / "run" / "trackio")}
    environment = os.environ | SECRETS | names | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    watch = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect", "-o", str(trace)]
    done = subprocess.run(
        [*watch, sys.executable, "-c", ALL_THREE, str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip().endswith("closed"), done.stdout + done.stderr
    assert "AF_UNIX" in trace.read_text()  # the trace works: wandb talks to its own process
    assert "AF_INET" not in trace.read_text()
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 3
    for path in written:
        content = path.read_bytes()
        assert not [name for name, key in SECRETS.items() if key.encode() in content], path
