"""Launches of the smallest sharded run, forked from one process that has imported everything:
exits_worker.py FOLDER ENDING..., a launch for each. Prints the ranks' exit codes, a launch a line.

ENDING: done; error and interrupted, raised on all ranks; lost, where rank 1 dies; defect, where
rank 1 raises what nobody expects. FOLDER/LAUNCH/RANK.json has the connection's threads that are
left as the process is about to end. With late_gloo.c preloaded, gloo's threads are late at the end.
"""

# ruff: noqa: E402
from __future__ import annotations

import atexit
import ctypes
import json
import os
import socket
import sys
from pathlib import Path

RANKS = 2
LATE_MS = "500"


@atexit.register
def as_python_finalizes() -> None:
    """Registered first, so it runs last: a late thread comes to wait for Python's lock."""
    if "LATE_MS" in os.environ:
        sys.setswitchinterval(5)
        os.environ["LATE_NOW"] = "1"
        ctypes.PyDLL(None).usleep(50_000)  # holds the lock


import torch
import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
from small_runs import small_config

import fastsd.training.session  # noqa: F401
from fastsd import train as training
from fastsd.errors import FastsdError, Interrupted
from fastsd.model import load_policy
from fastsd.runtime.world import guarded, leave, left_in_order, open_world
from fastsd.tasks.chain_sum import questions
from fastsd.training.recorder import Recorder

CONFIG = small_config(
    "grpo",
    optim={"steps": 1},
    rollout={"prompts_per_step": RANKS, "samples_per_prompt": 2},
    reward={"function": "reward_functions:coin"},
    eval={"questions": 1, "samples": 1},
)
_update = training.update


def ended(ending: str):
    """An update that ends the run so."""

    def update(session, *args, **kwargs):
        statistics = _update(session, *args, **kwargs)
        last_message(session.world)
        if ending == "error":
            raise FastsdError("on all ranks")
        if ending == "interrupted":
            raise Interrupted(15)
        if ending == "lost" and session.world.rank == 1:
            os._exit(3)
        if ending == "defect" and session.world.rank == 1:
            raise ValueError("a defect")
        return statistics

    return update


def last_message(world) -> None:
    os.environ["LATE_MS"] = LATE_MS
    world.gather(world.rank)


def threads() -> list[str]:
    """Names of the connection's threads in this process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sorted(name for name in names if name.startswith(("gloo_", "pt_")))


def run(ending: str, folder: Path) -> int:
    code = 0
    try:
        with left_in_order(), guarded():
            world = open_world(60.0)
            if ending != "done":
                training.update = ended(ending)
            training.train(CONFIG, folder / "run", Recorder("run"))
            last_message(world)
    except (FastsdError, Interrupted) as error:
        code = error.exit_code
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(threads()))
    return code


def launch(ending: str, folder: Path) -> list[int]:
    """The ranks' exit codes; a signal's number is negative."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fixed = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = []
    for rank in range(RANKS):
        pids.append(os.fork())
        if not pids[-1]:
            mine = fixed | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in mine.items()})
            leave(lambda: run(ending, folder))
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    # What every rank would work out again: half of its time.
    load_policy(CONFIG.model, "cpu", torch.float32)
    for split in ("train", "eval"):
        questions(split)
    for number, ending in enumerate(sys.argv[2:]):
        print(json.dumps(launch(ending, Path(sys.argv[1]) / str(number))), flush=True)
