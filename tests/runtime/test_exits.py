"""How the processes of a sharded run end: with the exit code of what ended it, never by a signal.

A worker thread of gloo's frees a message's tensors after it has said that the message is there. If
Python finalizes meanwhile, the thread is ended inside a destructor that must not be left, and the
process aborts: "terminate called without an active exception". exits_worker.py makes it that late.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import HELPERS
from small_runs import small_config
from torchrun import ENVIRONMENT, finished, torchrun

# Launches under load, of each kind.
FORKED = int(os.environ.get("FASTSD_FORKED_LAUNCHES", "15"))
BY_TORCHRUN = int(os.environ.get("FASTSD_TORCHRUN_LAUNCHES", "5"))
# What each ending leaves as the exit codes of both ranks.
CODES = {
    "done": [0, 0],
    "error": [2, 2],
    "interrupted": [143, 143],
    "lost": [1, 3],
    "defect": [1, 1],
}
AGREED = ("done", "error", "interrupted")


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> dict[str, str]:
    """The environment in which gloo's threads are late."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("late") / "late_gloo.so"
    source = HELPERS / "late_gloo.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def launches(folder: Path, endings: list[str], **environment: str) -> list[list[int]]:
    worker = [sys.executable, str(HELPERS / "exits_worker.py"), str(folder), *endings]
    ran = subprocess.run(worker, capture_output=True, text=True, env=ENVIRONMENT | environment)
    assert ran.returncode == 0 and "terminate called" not in ran.stderr, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]


@pytest.fixture
def load():
    """Two busy loops beside the test."""
    loop = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(loop) for _ in range(2)]
    yield
    for each in loops:
        each.kill()
        each.wait()


def test_late_threads_do_not_abort_any_way_a_run_ends(tmp_path, late):
    assert launches(tmp_path, list(CODES), **late) == list(CODES.values())
    for number, ending in enumerate(CODES):
        if ending in AGREED:
            files = [tmp_path / str(number) / f"{rank}.json" for rank in range(2)]
            assert [json.loads(file.read_text()) for file in files] == [[], []], ending


@pytest.mark.slow
def test_forked_launches_under_load(tmp_path, load):
    assert launches(tmp_path, FORKED * ["done"]) == FORKED * [CODES["done"]]


@pytest.mark.slow
def test_launches_by_torchrun_under_load(tmp_path, load):
    rollout = {"prompts_per_step": 2, "samples_per_prompt": 2}
    config = small_config("reference", optim={"steps": 1}, rollout=rollout)
    case = {"config": config.model_dump(mode="json"), "resume": None}
    for number in range(BY_TORCHRUN):
        (folder := tmp_path / str(number)).mkdir()
        (folder / "cases.json").write_text(json.dumps({"small": case}))
        finished(torchrun(str(HELPERS / "sharded_run_worker.py"), "train", str(folder)), 600)
        assert (folder / "small-2" / "metrics.jsonl").exists()
