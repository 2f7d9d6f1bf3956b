"""What the vocabulary-sharded loss head says to the other ranks, each kind of message in one call.

`gather` and not all-reduce: a row's partial sums are a few numbers, and merging them here in the
order of the ranks gives the same bits on every rank and in every column (a ring adds each segment
of its buffer in another order, so equal student and teacher sums would come back unequal).

`agree` runs before any other message. It carries each rank's description of its call in a buffer
of fixed size, so that ranks which would go on to exchange buffers of different sizes, or not at
all, all raise instead of hanging. A rank whose arguments are wrong takes part and says so.
Shape suffixes: R ranks, T rows, K columns.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import Tensor

_MESSAGE_BYTES = 8192
_LONGEST_VALUE, _LONGEST_ERROR = 60, 1000


class Ranks:
    """The process group; one process without torch.distributed is a group of one."""

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        elif group is not None:
            raise ValueError("group: given, but torch.distributed is not initialised; leave it out")
        if self.rank < 0:
            raise ValueError("group: this process is not a rank of the group it was given")

    def gather(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each [T] or [T, K] of every rank as [R, T] or [R, T, K]; all columns in one message."""
        flat = [x if x.ndim == 2 else x[:, None] for x in columns.values()]
        parts_RTK = self._gather(torch.cat(flat, 1))
        split = parts_RTK.split([x.shape[1] for x in flat], 2)
        return {
            name: part if x.ndim == 2 else part[:, :, 0]
            for (name, x), part in zip(columns.items(), split, strict=True)
        }

    def sum_(self, part: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1 and part.numel():
            dist.all_reduce(part, group=self._group)
        return part

    def agree(
        self, same: dict, own: dict, error: Exception | None, device: torch.device
    ) -> list[dict]:
        """Every rank's `own`, once `same` is equal on all and no rank has an error to report."""
        message = {"error": None if error is None else _short(error, _LONGEST_ERROR), "own": own}
        message["same"] = {name: _short(value, _LONGEST_VALUE) for name, value in same.items()}
        text = bytearray(json.dumps(message).encode().ljust(_MESSAGE_BYTES))
        assert len(text) == _MESSAGE_BYTES
        padded = torch.frombuffer(text, dtype=torch.uint8).to(device)
        everyone = [json.loads(bytes(row)) for row in self._gather(padded).tolist()]
        if error is not None:
            raise error
        for rank, other in enumerate(everyone):
            if other["error"] is not None:
                raise ValueError(f"rank {rank} of the group refused its call: {other['error']}")
        for name in dict.fromkeys(name for other in everyone for name in other["same"]):
            values = [other["same"].get(name, "nothing") for other in everyone]
            if len(set(values)) > 1:
                found = ", ".join(f"{value} on rank {r}" for r, value in enumerate(values))
                raise ValueError(
                    f"{name}: expected the same on every rank of the group, got {found}; only the "
                    "shards of head, teacher's head and bias differ between ranks"
                )
        return [other["own"] for other in everyone]

    def _gather(self, part: Tensor) -> Tensor:
        if self.size == 1:
            return part[None]
        everyone = part.new_empty(self.size, *part.shape)
        if part.numel():
            dist.all_gather(list(everyone.unbind()), part.contiguous(), group=self._group)
        return everyone


def _short(value: object, length: int) -> str:
    """In ASCII, which JSON at most doubles."""
    return ascii(str(value))[1:-1][:length]
