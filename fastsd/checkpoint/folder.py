"""Checkpoints that are either whole or not there.

A save goes into a hidden temporary folder beside its place. Every file is synced, then
MANIFEST.json (name, size, sha256 of each) is written last and synced, then the folder; one rename
puts it in place and the run folder is synced. A crash or a full disk at any point leaves the
earlier checkpoints untouched and at most a temporary folder, which loading ignores and the next
save removes. A checkpoint is never overwritten, and older ones go only after the new one verified.

    run/checkpoint-10/            a Hugging Face folder: `AutoModelForCausalLM.from_pretrained`
    run/checkpoint-10/trainer/    tensors (`sharded_checkpoint`), state.json (everything else)
    run/checkpoint-10/MANIFEST.json

Only safetensors and JSON: a checkpoint with a pickle in it is neither written nor read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastsd.checkpoint.manifest import (
    MANIFEST,
    STATE,
    TRAINER,
    fault,
    sha256,
    sync,
    verify,
    write_manifest,
)
from fastsd.checkpoint.tensors import SavedTensors, write_tensors
from fastsd.errors import CheckpointError
from fastsd.runtime.world import ALONE, World

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = ".checkpoint-{step}.tmp"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint: its folder, its step, and the trainer's state."""

    path: Path
    step: int
    tensors: SavedTensors
    state: dict[str, Any]


def save_checkpoint(
    run_dir: Path,
    step: int,
    save_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    world: World = ALONE,
) -> Path:
    """Write run_dir/checkpoint-STEP and delete all but the `keep` newest up to it: collective.

    `tensors`: each rank's part; they keep their dtype. The rest is rank 0's: `save_model(folder)`
    writes the Hugging Face files; `state` holds None, bool, int, finite float, str, lists and dicts
    with str keys, which JSON gives back exactly; tuples come back as lists.
    If the step is on disk already with the same tensors, that one is kept and returned: it differs
    at most in rollouts taken since, which a resumed run repeats. A damaged one is renamed to
    checkpoint-STEP.damaged1 (2, ...).
    Raises CheckpointError on every rank, the earlier checkpoints intact, when the disk is full or
    fails, when `state` does not fit JSON, or when a valid checkpoint of that step holds others.
    """
    place = Path(run_dir) / f"checkpoint-{step}"
    temporary = place.with_name(_TEMPORARY.format(step=step))
    try:
        world.lead(lambda: _begin(place, temporary, save_model, state))
        with _explained(place):
            write_tensors(temporary / TRAINER, tensors, world)
        world.lead(lambda: _finish(place, temporary, step))
    finally:
        if world.leads:
            shutil.rmtree(temporary, ignore_errors=True)
    world.lead(lambda: _rotate(place, step, keep))
    return place


def load_latest(run_dir: Path, world: World = ALONE) -> LoadedCheckpoint | None:
    """The newest checkpoint of run_dir that verifies, or None where there is none at all.

    Of many ranks, which call this together, the first verifies: one reading of all files is enough.
    Each one that does not verify is passed over with one warning that says why.
    Raises CheckpointError when there are checkpoints but none is valid, or when ranks see others.
    """
    newest = world.lead(lambda: _newest_valid(Path(run_dir)))
    seen = world.gather(_manifests(run_dir))
    other = next((rank for rank, manifests in enumerate(seen) if manifests != seen[0]), None)
    if other is not None:
        raise CheckpointError(
            f"{run_dir}: rank 0 finds {', '.join(seen[0]) or 'no checkpoint'} there, rank {other} "
            f"{', '.join(seen[other]) or 'none'}, or others of that name; the run folder must be "
            "one that all ranks share"
        )
    if newest is None:
        return None
    step, path = newest
    opened: list[LoadedCheckpoint] = []

    def read() -> None:
        state = json.loads((path / STATE).read_bytes())
        opened.append(LoadedCheckpoint(path, step, SavedTensors(path / TRAINER), state))

    world.together(read)
    return opened[0]


def _newest_valid(run_dir: Path) -> tuple[int, Path] | None:
    found = checkpoints(run_dir)
    for step, path in found:
        try:
            verify(path)
        except CheckpointError as reason:
            log.warning("%s; trying the checkpoint before it", reason)
            continue
        return step, path
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {run_dir} is valid; restore one from a "
            "backup, or start afresh in another run folder"
        )
    return None


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in run_dir, newest first, unverified."""
    if not Path(run_dir).is_dir():
        return []
    matches = [(_NAME.fullmatch(p.name), p) for p in Path(run_dir).iterdir()]
    return sorted(((int(m[1]), p) for m, p in matches if m and p.is_dir()), reverse=True)


def _manifests(run_dir: Path) -> dict[str, str]:
    """What tells the checkpoints of a run folder from others of the same names."""
    listed = {path.name: path / MANIFEST for _, path in checkpoints(run_dir)}
    return {name: sha256(file) for name, file in listed.items() if file.is_file()}


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    """What a full or broken disk raises inside is raised as CheckpointError."""
    try:
        yield
    except Exception as error:
        # tokenizers' writer, in Rust, raises a bare Exception where Python raises OSError.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise CheckpointError(
            f"could not save {place}: {error}. Earlier checkpoints are intact; free disk space "
            "(or lower checkpoint.keep) and continue with --resume auto"
        ) from error


def _begin(
    place: Path, temporary: Path, save_model: Callable[[Path], None], state: Mapping[str, Any]
) -> None:
    _check_json(state, "state")
    with _explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        for path in place.parent.glob(_TEMPORARY.format(step="*")):
            shutil.rmtree(path)
        (temporary / TRAINER).mkdir(parents=True)
        save_model(temporary)
        (temporary / STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")


def _finish(place: Path, temporary: Path, step: int) -> None:
    with _explained(place):
        write_manifest(temporary, step)
        if _make_room(place, temporary):
            os.rename(temporary, place)
            sync(place.parent)


def _make_room(place: Path, temporary: Path) -> bool:
    """Whether `temporary` may take `place`. False: the same checkpoint is there already."""
    if not place.exists():
        return True
    reason = fault(place)
    if reason is None:
        if _same_tensors(place / TRAINER, temporary / TRAINER):
            return False
        raise CheckpointError(
            f"{place} exists, is valid and holds other weights; it is not overwritten. Continue "
            "it with --resume auto, or choose another run folder"
        )
    number = 1
    while (aside := place.with_name(f"{place.name}.damaged{number}")).exists():
        number += 1
    log.warning("%s is not valid (%s); it is now %s", place, reason, aside.name)
    os.rename(place, aside)
    return True


def _same_tensors(folder: Path, other: Path) -> bool:
    """Compares content, one tensor at a time: another number of ranks writes other files."""
    ours, theirs = SavedTensors(folder), SavedTensors(other)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours.whole(name), theirs.whole(name))
        for name in ours
    )


def _rotate(place: Path, newest: int, keep: int) -> None:
    """Verify `place`, of step `newest`; then delete what is older than the `keep` newest up to it.

    Later steps are left alone: after a fall-back they are the damaged ones that were passed over.
    """
    verify(place)
    older = [path for step, path in checkpoints(place.parent) if step <= newest]
    for path in older[max(1, keep) :]:
        # A rename first: a kill halfway leaves a temporary, not a checkpoint that looks damaged.
        condemned = path.with_name(f".{path.name}.tmp")
        os.rename(path, condemned)
        shutil.rmtree(condemned)


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON would not give back as it was."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; JSON keys must be str")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where} is {value}, which JSON cannot hold; save None instead")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}, not JSON; tensors go into `tensors`"
        )
