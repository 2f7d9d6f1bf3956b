"""A weight transfer in memory: where trainer and servers are threads of one test, instead of NCCL.

As in NCCL, nobody goes on before all others came: a server that died keeps the rest waiting until
the trainer leaves the group. Only meeting has an end, as vLLM's has.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

MEETING_S, LONGEST_WAIT_S = 1.0, 20.0


class Wire:
    """One group: its ranks meet, then the trainer sends each of them every tensor."""

    _known: ClassVar[dict[tuple[str, int], Wire]] = {}
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.joined: set[int] = set()
        self.left = False
        self._queues: dict[int, queue.Queue[Tensor]] = {}

    @classmethod
    def opened(cls, address: str, port: int) -> Wire:
        """By the trainer: the system may give it the port of an earlier group again."""
        with cls._lock:
            wire = cls._known[address, port] = cls()
        return wire

    @classmethod
    def at(cls, address: str, port: int) -> Wire:
        with cls._lock:
            return cls._known[address, port]

    def join(self, ranks: Sequence[int], world_size: int) -> None:
        with self._lock:
            assert not self.joined & set(ranks) and max(ranks) < world_size, "a rank is taken"
            self._queues |= {rank: queue.Queue(1) for rank in ranks}
            self.joined |= set(ranks)
        self._until(lambda: len(self.joined) == world_size, MEETING_S)

    def send(self, tensor: Tensor) -> None:
        for rank, waiting in self._queues.items():
            if rank:
                self._until(lambda waiting=waiting: not waiting.full())
                waiting.put(tensor.clone())

    def receive(self, ranks: Sequence[int]) -> Tensor:
        """What each of a server's workers was sent: the same."""
        for rank in ranks:
            self._until(lambda rank=rank: not self._queues[rank].empty())
        tensors = [self._queues[rank].get() for rank in ranks]
        return tensors[0]

    def _until(self, ready, longest_s: float = LONGEST_WAIT_S) -> None:
        end = time.monotonic() + longest_s
        while not ready():
            if self.left or time.monotonic() > end:
                raise RuntimeError("NCCL error: remote process exited")
            time.sleep(0.001)


@dataclass
class MemoryEngine:
    """Calls its client in the order and the threads in which vLLM's trainer engine does."""

    wire: Wire
    client: object
    source: object

    @classmethod
    def open(cls, address, port, group, weights) -> MemoryEngine:
        wire = Wire.opened(address, port)
        info = {"master_address": address, "master_port": port, "rank_offset": 1}
        with ThreadPoolExecutor(1) as pool:
            called = pool.submit(
                group.init_weight_transfer_engine, {**info, "world_size": group.world_size}
            )
            wire.join([0], group.world_size)
            called.result()
        return cls(wire, group, weights)

    def send_weights(self) -> None:
        metas = self.source.metadata()
        told = {
            "names": [meta.name for meta in metas],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metas],
            "shapes": [list(meta.shape) for meta in metas],
        }
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        try:
            called = pool.submit(self.client.update_weights, told)
            for _, tensor in self.source:
                self.wire.send(tensor)
            called.result()
        finally:
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.wire.left = True
