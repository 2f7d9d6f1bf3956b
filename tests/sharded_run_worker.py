"""One rank of test_sharded_run.py and test_world.py: torchrun sharded_run_worker.py WHAT FOLDER.

train    FOLDER/cases.json maps names to {config, resume: null or [run folder's name, step]}; each
         is trained into FOLDER/NAME-RANKS, or continued there from a checkpoint of another run.
         memory-RANK.json has the bytes of the rank's shards after the last update, and how much
         of the head it had in the loss head; error-RANK.json what ended it.
world    what World does where a rank fails; answers go to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from fastsd import train as training
from fastsd.checkpoint import checkpoints
from fastsd.config import Config, ConfigError
from fastsd.errors import CriticUnavailable, FastsdError, Interrupted
from fastsd.recorder import Recorder
from fastsd.runtime.shards import local
from fastsd.runtime.signals import SignalGate
from fastsd.runtime.world import guarded, left_in_order, open_world

_update = training.update


def shard_bytes(session, *args, **kwargs):
    """An update; then notes what this rank holds, the gradients being those before the step."""
    step, gradients = session.optimizer.step, {}
    loss_head, heads = session.weights.loss_head, set()

    def noted_head(*given):
        heads.add(len(local(session.policy.head_VD)))
        return loss_head(*given)

    def noted_step():
        found = session.optimizer.parameters.items()
        gradients.update({name: local(p.grad) for name, p in found if p.grad is not None})
        return step()

    session.optimizer.step, session.weights.loss_head = noted_step, noted_head
    statistics = _update(session, *args, **kwargs)
    session.optimizer.step, session.weights.loss_head = step, loss_head
    state = session.optimizer.state_tensors()
    parts = {
        "parameters": dict(session.policy.model.named_parameters()),
        "optimizer": {name: t for name, t in state.items() if not name.startswith("master/")},
        "gradients": gradients,
    }
    sizes = {name: sum(local(t).nbytes for t in part.values()) for name, part in parts.items()}
    sizes["head rows"] = sum(heads)
    file = session.run_dir / f"memory-{session.world.rank}.json"
    file.write_text(json.dumps(sizes))
    return statistics


def copy_cut(source: Path, target: Path, step: int) -> None:
    """A run's folder as it was when the checkpoint of `step` was its newest."""
    shutil.copytree(source, target)
    for saved, path in checkpoints(target):
        if saved > step:
            shutil.rmtree(path)


def train_case(folder: Path, run_dir: Path, case: dict) -> None:
    config = Config(**case["config"])
    world = open_world(config.parallel.timeout_s)
    if case["resume"] is not None:
        source, step = case["resume"]
        world.lead(lambda: copy_cut(folder / source, run_dir, step))
        config = config.model_copy(update={"resume": "auto"})
    torch.manual_seed(0)
    try:
        training.train(config, run_dir, Recorder(run_dir.name))
    except FastsdError as error:
        run_dir.mkdir(exist_ok=True)
        told = json.dumps({"kind": type(error).__name__, "text": str(error)})
        (run_dir / f"error-{world.rank}.json").write_text(told)


def train_cases(folder: Path) -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    training.update = shard_bytes
    try:
        for name, case in json.loads((folder / "cases.json").read_text()).items():
            train_case(folder, folder / f"{name}-{size}", case)
    finally:
        training.update = _update


def told(work) -> list[str]:
    try:
        return ["", str(work())]
    except (Exception, Interrupted) as error:
        return [type(error).__name__, str(error)]


def on(rank: int, error: BaseException):
    """Work that fails on one rank."""

    def work() -> int:
        if world.rank == rank:
            raise error
        return world.rank

    return lambda: world.together(work)


def signalled(gate: SignalGate) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    gate.agree()


def signalled_alone(gate: SignalGate) -> None:
    def work() -> None:
        with gate.opened():
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)

    world.together(work)


def hung() -> None:
    with guarded(lambda: " in phase 'test'"):
        if world.rank == 1:
            time.sleep(4)
        world.gather(0)


def world_cases(folder: Path) -> None:
    answers = {
        "gather": told(lambda: world.gather(world.rank * 10)),
        "lead": told(lambda: world.lead(lambda: f"from {world.rank}")),
        "lead fails": told(lambda: world.lead(lambda: 1 // 0)),
        "fastsd": told(on(1, CriticUnavailable("no reply"))),
        "config": told(on(1, ConfigError(["a: wrong", "b: wrong"]))),
        "defect": told(on(0, ValueError("a defect"))),
        "both": told(lambda: world.together(lambda: [][world.rank])),
    }
    for case in (signalled, signalled_alone):
        gate = SignalGate(world)
        answers[case.__name__] = told(lambda gate=gate, case=case: _within(gate, case))
    answers["hung"] = told(hung)
    (folder / f"{world.rank}.json").write_text(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)  # the connection is broken, as it should be


def _within(gate: SignalGate, case) -> None:
    with gate:
        case(gate)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = open_world(2.0 if sys.argv[1] == "world" else 60.0)
    with left_in_order():
        {"train": train_cases, "world": world_cases}[sys.argv[1]](Path(sys.argv[2]))
