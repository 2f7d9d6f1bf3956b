"""A save killed at any moment leaves a newest checkpoint that loads."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastsd.checkpoint import checkpoints, load_latest
from tests.test_checkpoint import FORK, assert_holds, save


def keep_saving(run, step):
    torch.set_num_threads(1)
    while True:
        save(run, step, keep=2)
        step += 1


def audit_kill(run, step, kill_at):
    """Save once; die at the kill_at-th thing that Python asks of the file system."""
    events = [0]

    def hook(event, _arguments):
        if event == "open" or event.split(".")[0] in ("os", "shutil"):
            events[0] += 1
            if events[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(run, step, keep=2)
    os._exit(0)


def newest_after_a_kill(run, before):
    loaded = load_latest(run)
    assert_holds(loaded, loaded.step)
    assert loaded.step >= before
    # A newer folder that does not verify would have been passed over: there must be none.
    assert checkpoints(run)[0] == (loaded.step, loaded.path)
    return loaded.step


@pytest.mark.parametrize("kills", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_random_kills(tmp_path, kills):
    rng = random.Random(7)
    save(tmp_path, 1)
    step = 1
    for _ in range(kills):
        child = FORK.Process(target=keep_saving, args=(tmp_path, step + 1))
        child.start()
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        step = newest_after_a_kill(tmp_path, step)
    assert step > 1
    save(tmp_path, step + 1, keep=2)
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert leftovers == [] and len(checkpoints(tmp_path)) == 2


def test_kill_at_every_python_level_boundary(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    step, kill_at = 2, 1
    while True:
        child = FORK.Process(target=audit_kill, args=(tmp_path, step + 1, kill_at))
        child.start()
        child.join()
        step = newest_after_a_kill(tmp_path, step)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kill_at += 1
    assert kill_at > 40


SAVE_ONCE = """
import sys, torch
from pathlib import Path
from tests.test_checkpoint import save
torch.set_num_threads(1)
Path(sys.argv[1], "started").stat()
save(Path(sys.argv[1]), int(sys.argv[2]), keep=2)
"""


@pytest.mark.slow
def test_kill_at_every_syscall_boundary(tmp_path):
    """strace kills a save at its n-th file system call, for every n."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    calls = "openat,write,pwrite64,fsync,ftruncate,mkdir,rename,unlink,unlinkat,rmdir,close"
    (tmp_path / "started").touch()
    for step in (1, 2):
        save(tmp_path, step, keep=2)

    def child(run, step, *options):
        command = ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), *options]
        command += [sys.executable, "-c", SAVE_ONCE, str(run), str(step)]
        roots = os.pathsep.join(["."] + [p for p in sys.path if p])
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": roots}).returncode

    assert child(tmp_path, 3, "-e", f"trace={calls},stat,newfstatat") == 0
    lines = (tmp_path / "trace").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "/started" in line)
    names = calls.split(",")
    made = [line.split(None, 1)[1].split("(")[0] for line in lines]
    points = [
        (name, n)
        for name in names
        for n in range(made[:first].count(name) + 1, made.count(name) + 1)
    ]
    step = 3
    for name, n in points:
        child(tmp_path, step + 1, "-e", f"inject={name}:signal=SIGKILL:when={n}")
        step = newest_after_a_kill(tmp_path, step)
    print(f"{len(points)} syscall boundaries")
    assert len(points) >= 50
