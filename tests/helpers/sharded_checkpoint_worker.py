"""One rank of test_sharded_checkpoint.py.

Reads the checkpoints that are named, writes others into FOLDER/N-..., N being the
number of ranks, and notes in FOLDER/N-RANK.json what happened. Two ranks also try what fails.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from fastsd.checkpoint import load_latest, save_checkpoint, tensors
from fastsd.errors import FastsdError
from fastsd.runtime.shards import whole
from fastsd.runtime.world import ALONE, World, guarded, open_world

world = ALONE
STATE = {"cursor": 3}
SPREAD = ("optimizer/master", "optimizer/exp_avg", "teacher/bf16", "one", "three", "flat")


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """Whole ones: all types, none or one or few rows, more rows than ranks divide."""
    draw = torch.Generator().manual_seed(step)
    return {
        "optimizer/master": torch.randn(7, 5, generator=draw),
        "optimizer/exp_avg": torch.randn(8, 3, 2, generator=draw),
        "teacher/bf16": torch.randn(9, 3, generator=draw).bfloat16(),
        "one": torch.randn(1, generator=draw),
        "three": torch.randn(3, 2, generator=draw),
        "flat": torch.randn(1001, generator=draw),
        "torch_rng": torch.randint(256, (11,), generator=draw, dtype=torch.uint8),
        "steps": torch.tensor(2**40 + step),
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
    }


def spread(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows over the ranks, as FSDP2 has them; the others are whole on each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.size,))
    return {
        name: distribute_tensor(t, mesh, [Shard(0)]) if name in SPREAD else t
        for name, t in tensors.items()
    }


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def save(run_dir: Path, step: int, of: int | None = None, ranks: World | None = None) -> Path:
    """checkpoint-STEP with the tensors of step `of`."""
    tensors = tensors_of(step if of is None else of)
    ranks = world if ranks is None else ranks
    tensors = spread(tensors) if ranks.size > 1 else tensors
    return save_checkpoint(run_dir, step, write_model, tensors, STATE, 9, ranks)


def told(work: Callable[[], object]) -> list[str]:
    try:
        return ["", str(work())]
    except FastsdError as error:
        return [type(error).__name__, str(error)]


def differing(run_dir: Path) -> list[str]:
    """Names of the tensors that are not read back as they were, each rank reading its part."""
    found = load_latest(run_dir)
    assert found is not None
    want = tensors_of(found.step)
    got = spread({name: torch.full_like(t, 77) for name, t in want.items()})
    found.tensors.read(got)
    gathered = {name: whole(t) for name, t in got.items()}
    return [name for name, t in want.items() if not torch.equal(gathered[name], t)]


def with_file_limit(rank: int, work: Callable[[], object]) -> list[str]:
    """Writes fail on one rank as they do on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        return told(work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def elsewhere(rank: int, folder: Path) -> list[str]:
    """One rank has the run folder on a disk of its own."""
    return told(lambda: save(folder / "own" if world.rank == rank else folder, 1))


def one_dies(run_dir: Path) -> None:
    """While it writes its shards."""
    if world.rank == 1:
        tensors._settle = lambda path: os._exit(0)
    with guarded(lambda: " in phase 'save'"):
        save(run_dir, 1)


def failures(folder: Path) -> dict[str, list[str]]:
    save(folder / "2-fails", 1)
    return {
        "same": told(lambda: save(folder / "1-again", 1)),
        "other": told(lambda: save(folder / "1-again", 1, of=2)),
        "full 0": with_file_limit(0, lambda: save(folder / "2-fails", 2)),
        "full 1": with_file_limit(1, lambda: save(folder / "2-fails", 2)),
        "elsewhere": elsewhere(1, folder / "2-elsewhere"),
        "well again": told(lambda: save(folder / "2-fails", 2)),
    }


def main(folder: Path, reads: list[str]) -> None:
    global world
    world = open_world(60.0)
    answers = {name: differing(folder / name) for name in reads}
    for name in ("whole", "twice"):
        save(folder / f"{world.size}-{name}", 1)
    tensors._FILE_BYTES = 64
    save(folder / f"{world.size}-files", 1)
    answers["own"] = differing(folder / f"{world.size}-files")
    if world.size == 2:
        answers |= failures(folder)
    file = folder / f"{world.size}-{world.rank}.json"
    file.write_text(json.dumps(answers))
    if world.size == 2:
        answers["dead"] = told(lambda: one_dies(folder / "2-dead"))
        file.write_text(json.dumps(answers))
    os._exit(0)  # the connection is broken, as it should be
