"""The trainer's tensors on disk: one safetensors file of one process, or files of every rank.

One process writes state.safetensors. Many write through torch.distributed.checkpoint's safetensors
storage, every rank its own shards and nothing gathered: masters and moments are 12 bytes a
parameter, more than one rank may have room for. There is one way to read: that storage looks in
whatever files there are for what this rank holds, so a run continues on any number of ranks.

Importing torch.distributed.checkpoint takes over a second, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastsd.errors import CheckpointError
from fastsd.runtime.world import World

# A rank's bytes in one file: torch's writer makes a file in memory before it writes it.
_FILE_BYTES = 64 * 2**20
_FLAT = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


class SavedTensors(dict[str, Tensor]):
    """The tensors of a folder that `write_tensors` wrote. The values have shape and dtype but no
    content: `read` and `whole` get it. Raises CheckpointError where the files are broken.

    prefix: only those whose names begin so, under the rest of their names."""

    def __init__(self, folder: Path, prefix: str = ""):
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        self._folder, self._prefix = folder, prefix
        self._reader: Any = HuggingFaceStorageReader(str(folder))
        with _reading(folder):
            found = self._reader.read_metadata()
        # Each load would read the headers of all files again.
        self._reader.read_metadata = lambda: found
        for name, tensor in found.state_dict_metadata.items():
            if name.startswith(prefix):
                empty = torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
                self[name.removeprefix(prefix)] = empty

    def part(self, prefix: str) -> SavedTensors:
        """Those whose names begin with `prefix`."""
        return SavedTensors(self._folder, self._prefix + prefix)

    def whole(self, name: str) -> Tensor:
        """One tensor with its content, on the CPU, read by this rank alone."""
        tensor = torch.empty_like(self[name], device="cpu")
        self.read({name: tensor}, alone=True)
        return tensor

    def read(self, targets: Mapping[str, Tensor], alone: bool = False) -> None:
        """Gives each target the values of its name. Every rank reads its part, and all call this
        together, or this one `alone`."""
        from torch.distributed.checkpoint import DefaultLoadPlanner, load

        named: dict[str, Any] = {self._prefix + name: t for name, t in targets.items()}
        with _reading(self._folder), _first_failure():
            planner = DefaultLoadPlanner(**_FLAT)
            load(named, storage_reader=self._reader, planner=planner, no_dist=alone)


def copy_into(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Gives each target the values of its name in `saved`: on disk, or spread as the target is."""
    if isinstance(saved, SavedTensors):
        saved.read(targets)
        return
    for name, target in targets.items():
        target.copy_(saved[name])


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Writes tensors into a folder that rank 0 has made: collective.

    Every rank gives the same names, each its part; of one that all have whole, rank 0's is written.
    The same tensors on the same number of ranks give the same bytes. Raises OSError or
    SafetensorError, on every rank, where one cannot write.
    """
    if world.size == 1:
        save_file(_separate(tensors), folder / "state.safetensors")
        return
    from torch.distributed.checkpoint import DefaultSavePlanner, save

    planner = DefaultSavePlanner(**_FLAT, dedup_save_to_lowest_rank=True)
    with _first_failure():
        save(dict(tensors), storage_writer=_writer(folder, tensors, world), planner=planner)


def _writer(folder: Path, tensors: Mapping[str, Tensor], world: World) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    class Writer(HuggingFaceStorageWriter):
        def prepare_local_plan(self, plan: Any) -> Any:
            if not folder.is_dir():
                raise OSError(f"{folder} is not there: all ranks must share the run folder")
            return plan

        def write_data(self, plan: Any, planner: Any) -> Any:
            written = super().write_data(plan, planner)
            for name in {result.storage_data.relative_path for result in written.value()}:
                _settle(folder / name)
            return written

    return Writer(str(folder), _file_numbers(tensors, world.size), save_distributed=True)


def _file_numbers(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """For each tensor the number, from 1, of the file of every rank that has its part."""
    numbers, number, room = {}, 0, -1
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() // ranks
        if size > room:
            number, room = number + 1, _FILE_BYTES
        numbers[name] = number
        room -= size
    return numbers


def _settle(path: Path) -> None:
    """Puts the metadata in a file's header into order, which safetensors leaves to chance, and
    syncs the file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) > size:
            raise OSError(f"{path} has a header that is not compact JSON")
        file.seek(8)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors without shared storage, which safetensors refuses."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """torch wraps what went wrong on any rank in a BaseException, raised on all: here the error of
    the first such rank is raised."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        if isinstance(error, OSError):
            raise OSError(f"rank {rank}: {error}") from failed
        raise error from failed


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {folder}: {error}; restore it from a backup") from error
