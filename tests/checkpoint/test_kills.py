"""A save killed at any moment leaves a newest checkpoint that loads."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from written_checkpoints import FORK, assert_holds, save

from fastsd.checkpoint import checkpoints, load_latest


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
    began = time.monotonic()
    save(tmp_path, 1)
    # On a busy machine too, some saves end before the kill.
    latest = max(0.12, 5 * (time.monotonic() - began))
    step = 1
    for _ in range(kills):
        child = FORK.Process(target=keep_saving, args=(tmp_path, step + 1))
        child.start()
        time.sleep(rng.uniform(0.005, latest))
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


def save_on_signal(run, step, gate):
    """Save once when the parent says so: by then strace watches."""
    torch.set_num_threads(1)
    os.read(gate, 1)
    save(run, step, keep=2)
    os._exit(0)


def strace_save(run, step, trace, *options):
    """Exit code of a child that saves under strace with these options."""
    gate, opener = os.pipe()
    child = FORK.Process(target=save_on_signal, args=(run, step, gate))
    child.start()
    command = ["strace", "-p", str(child.pid), "-f", "-o", str(trace), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        attached = strace.stderr.readline()
        os.write(opener, b"x")
        child.join()
    os.close(gate)
    os.close(opener)
    assert "attached" in attached
    return child.exitcode


@pytest.mark.slow
def test_kill_at_every_syscall_boundary(tmp_path):
    """strace kills a save at its n-th call of each system call, for every n."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    run, trace = tmp_path / "run", tmp_path / "trace"
    for step in (1, 2):
        save(run, step, keep=2)
    assert strace_save(run, 3, trace) == 0
    # "PID name(arguments...": calls on one process, in order.
    made = Counter(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), flags=re.MULTILINE))
    points = [(name, n) for name in made for n in range(1, made[name] + 1)]
    step, killed = 3, 0
    for name, n in points:
        code = strace_save(run, step + 1, trace, "-e", f"inject={name}:signal=SIGKILL:when={n}")
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        step = newest_after_a_kill(run, step)
    print(f"{killed} kills at {len(points)} system calls of {len(made)} kinds")
    assert killed >= 200
