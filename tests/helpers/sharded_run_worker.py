"""Runs of one process or many that are compared: `run_cases`; and one rank of test_world.py.

A case is a configuration and None or (run folder's name, step). It is trained into
FOLDER/NAME-RANKS, or continued there from a checkpoint of another run; on the draws of the first
run of its name (given_draws.py). memory-RANK.json has the bytes of the rank's shards after the last
update, and how much of the head it had in the loss head; error-RANK.json what ended it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from given_draws import same_draws
from ranks import run_ranks

from fastsd import train as training
from fastsd.checkpoint import checkpoints
from fastsd.config import Config, ConfigError
from fastsd.errors import CriticUnavailable, FastsdError, Interrupted
from fastsd.runtime.shards import local
from fastsd.runtime.signals import SignalGate
from fastsd.runtime.world import ALONE, guarded, open_world
from fastsd.training.recorder import Recorder

Case = tuple[dict, tuple[str, int] | None]
world = ALONE

_update = training.update


def shard_bytes(session, *args, **kwargs):
    """An update; then notes what this rank holds, the gradients being those before the step."""
    step, gradients = session.optimizer.step, {}
    loss_head, heads = session.placement.loss_head, set()

    def noted_head(*given):
        heads.add(len(local(session.policy.head_VD)))
        return loss_head(*given)

    def noted_step():
        found = session.optimizer.parameters.items()
        gradients.update({name: local(p.grad) for name, p in found if p.grad is not None})
        return step()

    session.optimizer.step, session.placement.loss_head = noted_step, noted_head
    statistics = _update(session, *args, **kwargs)
    session.optimizer.step, session.placement.loss_head = step, loss_head
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


def train_case(folder: Path, name: str, case: Case) -> None:
    tree, resume = case
    config = Config(**tree)
    world = open_world(config.parallel.timeout_s)
    run_dir = folder / f"{name}-{world.size}"
    if resume is not None:
        source, step = resume
        name = source.rpartition("-")[0]
        world.lead(lambda: copy_cut(folder / source, run_dir, step))
        config = config.model_copy(update={"resume": "auto"})
    torch.manual_seed(0)
    try:
        with same_draws(folder / f"{name}.draws", first=world.size == 1):
            training.train(config, run_dir, Recorder(run_dir.name))
    except FastsdError as error:
        run_dir.mkdir(exist_ok=True)
        told = json.dumps({"kind": type(error).__name__, "text": str(error)})
        (run_dir / f"error-{world.rank}.json").write_text(told)


def train_cases(folder: Path, cases: dict[str, Case]) -> None:
    training.update = shard_bytes
    try:
        for name, case in cases.items():
            train_case(folder, name, case)
    finally:
        training.update = _update


def run_cases(
    folder: Path,
    ranks: int,
    trees: dict[str, dict],
    resume: dict[str, tuple[str, int]] | None = None,
    timeout_s: float = 240,
) -> None:
    """Runs all cases, in this process or by one launch of many ranks."""
    cases = {name: (tree, (resume or {}).get(name)) for name, tree in trees.items()}
    if ranks == 1:
        train_cases(folder, cases)
    else:
        run_ranks(train_cases, folder, cases, ranks=ranks, timeout_s=timeout_s)


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
    """What World does where a rank fails; answers go to FOLDER/RANK.json."""
    global world
    world = open_world(2.0)
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
    os._exit(0)  # the connection is broken, as it should be


def _within(gate: SignalGate, case) -> None:
    with gate:
        case(gate)
