"""The servers of one NCCL group, which vLLM's trainer engine calls as if they were one.

All of them take part in a transfer or none can: whoever is missing keeps the others waiting inside
NCCL, where nothing reaches them. So the first failure, or the end of the time, ends the transfer
for all. Who failed first is at fault, and so is who has not answered GRACE_S later; the others can
be asked again, in another group. Those who met at its beginning wait longer: vLLM gives that up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fastsd.serving.fleet import ask
from fastsd.serving.server import RolloutError, ServerLost, VllmServer

if TYPE_CHECKING:
    import httpx

# Seconds that a group has for its last answers, once a server of it has failed.
GRACE_S = 10.0
# The same while they meet, which vLLM's store of addresses ends after 300.
MEETING_S = 310.0
_POLL_S = 0.1


class Broken(Exception):
    """A server of the group failed, or the group was given up: for the engine, to end its work."""


class Engine(Protocol):
    """vLLM's side of a transfer in the trainer, as `NCCLTrainerWeightTransferEngine` has it."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


class ServerGroup:
    """The servers of one NCCL group, called as one: vLLM's VLLMWeightSyncClient.

    servers: with the number of their workers, in the order of ranks, which begin at 1. failed: who
    did not do as told, and why.
    """

    def __init__(self, servers: Sequence[tuple[VllmServer, int]]):
        self.servers = [server for server, _ in servers]
        sizes = (size for _, size in servers)
        *starts, self.world_size = itertools.accumulate(sizes, initial=1)
        self._rank_offset = dict(zip(self.servers, starts, strict=True))
        self.engine: Engine | None = None
        self.failed: dict[VllmServer, str] = {}
        self.place = ""
        self._error: Exception | None = None
        self._deadline, self._grace_s = 0.0, GRACE_S
        # Of the present transfer: no more is to be waited for; no call is under way; all is done.
        self._over, self._idle = threading.Event(), threading.Event()
        self._whole = self._given_up = False

    def begin(self, timeout_s: float) -> None:
        """A transfer that may take so many seconds."""
        self._deadline = time.monotonic() + timeout_s
        self._over.clear()
        self._idle.set()
        self._whole = False

    def end(self, error: Exception | None) -> None:
        """The engine has nothing more to do, or cannot."""
        self._whole = error is None and not self._over.is_set()
        if not self._over.is_set():
            self._error = error
        self._over.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether the transfer was done in time; else `failed` has whose fault that was."""
        in_time = self._over.wait(timeout_s + 1.0)
        if self._whole:
            return True
        if not in_time:
            late = f" did not take the weights in rollout.timeout_s = {timeout_s:g} s"
            self.failed |= dict.fromkeys(self.servers, late)
        self._over.set()
        if self.engine is not None:
            self.engine.shutdown()  # wakes some of those that wait
        self._idle.wait(self._grace_s + 1.0)
        if self._error is not None:
            here = f" (here: {type(self._error).__name__}: {self._error})"
            self.failed = {server: why + here for server, why in self.failed.items()}
        return False

    def refuse(self) -> None:
        """Raises RolloutError where the fault is a server's settings, or none of the servers'."""
        error = self._error
        if isinstance(error, RolloutError):
            raise error
        if error is None or self.failed:
            return
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise RolloutError(
                f"rollout.sync: {self.place}, where the servers were to meet this process, was "
                "taken by another program at that moment: start the run again"
            ) from error
        raise RolloutError(
            f"rollout.sync: vLLM's weight transfer failed in this process, {type(error).__name__}: "
            f'{error}; set rollout.sync = "files", or see the log for what NCCL says'
        ) from error

    def give_up(self) -> None:
        """Ends every call, makes every later one fail, and leaves the group."""
        self._given_up = True
        self._over.set()
        if self.engine is not None:
            self.engine.shutdown()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        async def begin(client: httpx.AsyncClient, server: VllmServer) -> None:
            body = {"init_info": {**init_info, "rank_offset": self._rank_offset[server]}}
            # An earlier group would keep its memory there. None, or a broken one, is no matter.
            with contextlib.suppress(ServerLost):
                await server.transfer(client, "shutdown_weight_transfer_engine", self._left())
            await server.transfer(client, "init_weight_transfer_engine", self._left(), body)

        self._all(begin, MEETING_S)

    def start_weight_update(self) -> None:
        async def start(client: httpx.AsyncClient, server: VllmServer) -> None:
            try:
                await server.transfer(client, "start_weight_update", self._left())
            except ServerLost as error:
                if "HTTP 500" not in str(error):
                    raise
                # One that broke off is under way there still; what it left is written over.
                with contextlib.suppress(ServerLost):
                    await server.transfer(client, "finish_weight_update", self._left())
                await server.transfer(client, "start_weight_update", self._left())

        self._all(start)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        async def take(client: httpx.AsyncClient, server: VllmServer) -> None:
            await server.take_weights(client, update_info, self._left())

        self._all(take)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The mark is set later, once the old weights' prefixes are gone."""

        async def finish(client: httpx.AsyncClient, server: VllmServer) -> None:
            await server.transfer(client, "finish_weight_update", self._left())

        self._all(finish)

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.01)

    def _all(self, call: Callable[..., Awaitable[None]], grace_s: float | None = None) -> None:
        if self._over.is_set():
            raise Broken
        self._grace_s = GRACE_S if grace_s is None else grace_s
        self._idle.clear()
        try:
            ask(lambda client: self._call_all(client, call))
        finally:
            self._idle.set()
        if self._over.is_set():
            raise Broken

    async def _call_all(
        self, client: httpx.AsyncClient, call: Callable[..., Awaitable[None]]
    ) -> None:
        """call(client, server) for each server, until all answered or some time after a failure."""

        async def attempt(server: VllmServer) -> None:
            try:
                await call(client, server)
            except (ServerLost, RolloutError) as error:
                self._note(server, error)

        calls = {asyncio.ensure_future(attempt(server)): server for server in self.servers}
        end, waiting = float("inf"), set(calls)
        while waiting and time.monotonic() < end and not self._given_up:
            _, waiting = await asyncio.wait(waiting, timeout=_POLL_S)
            if self._over.is_set():
                end = min(end, time.monotonic() + self._grace_s)
        for task in waiting:
            task.cancel()
            self.failed.setdefault(calls[task], " still waits for one that failed: start it again")
        await asyncio.gather(*calls, return_exceptions=True)

    def _note(self, server: VllmServer, error: ServerLost | RolloutError) -> None:
        """Who fails after another, in time, may have failed for that, and is asked again."""
        if self._over.is_set() and time.monotonic() < self._deadline:
            return
        if isinstance(error, RolloutError):
            self._error = error
        else:
            self.failed[server] = str(error)
        self._over.set()
