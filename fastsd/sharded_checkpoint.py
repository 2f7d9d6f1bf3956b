"""The trainer's state of many ranks, written and read one tensor at a time.

A checkpoint is the same folder whatever the number of ranks: trainer/state.safetensors has whole
tensors. Masters and moments are 12 bytes a parameter, more than a rank may have room for. So rank 0
writes the file as its header says and asks for one tensor after the other, which every rank helps
to gather; and a rank reads one tensor after the other and keeps its part.

torch.distributed.checkpoint is not used: its safetensors storage leaves a file for each rank, whose
consolidation writes the state a second time and refuses tensors of integers, such as a generator's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastsd.shards import whole
from fastsd.types import CheckpointError
from fastsd.world import World

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class SavedTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each read when it is asked for. prefix: only those whose names
    begin so, under the rest of their names."""

    def __init__(self, path: Path, prefix: str = ""):
        self._path, self._prefix = path, prefix
        self._file = safe_open(path, "pt")
        self._names = [n.removeprefix(prefix) for n in self._file.keys() if n.startswith(prefix)]  # noqa: SIM118

    def part(self, prefix: str) -> SavedTensors:
        """Those whose names begin with `prefix`."""
        return SavedTensors(self._path, self._prefix + prefix)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_state(path: Path, tensors: Mapping[str, Tensor], world: World) -> Path:
    """Writes whole tensors to a safetensors file on rank 0 and returns its path: collective.

    Every rank gives the same names, each its part. Raises CheckpointError on every rank where
    rank 0 cannot write, and leaves no file then.
    """
    # safetensors wants every tensor aligned to its type.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    file, failed = None, None
    try:
        file = _begin(path, {name: tensors[name] for name in names}) if world.leads else None
    except OSError as error:
        failed = error
    for name in names:
        # After a failure too: the other ranks wait for this one.
        full = whole(tensors[name].detach())
        try:
            if file is not None and failed is None:
                file.write(_bytes(full))
        except OSError as error:
            failed = error
    return world.lead(lambda: _end(path, file, failed))


def _begin(path: Path, tensors: Mapping[str, Tensor]) -> IO[bytes]:
    """The file with its header: a length, then JSON padded to eight bytes."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("wb")
    file.write(len(header).to_bytes(8, "little") + header)
    return file


def _end(path: Path, file: IO[bytes] | None, failed: OSError | None) -> Path:
    try:
        if file is not None:
            file.close()
    except OSError as error:
        failed = failed or error
    if failed is not None:
        if path.exists():
            path.unlink()
        raise CheckpointError(
            f"could not save {path}: {failed}. Earlier checkpoints are intact; free disk space "
            "(or lower checkpoint.keep) and continue with --resume auto"
        ) from failed
    return path


def _bytes(tensor: Tensor) -> Any:
    """An array that a file can be given: no copy where the tensor is on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
