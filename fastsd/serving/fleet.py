"""The vLLM servers of a run taken together: who lives, what weights they hold, who draws what.

A group of responses is one request, so that a server computes its prompt once. It goes to the
server that has least under way, within `rollout.concurrency` groups and `rollout.server_tokens`
tokens at each. Where a server fails, its groups are drawn elsewhere, whole, and it is left out
until the weights are looked after again. When all groups are there, the servers are asked for the
mark that came with their weights: one that was restarted meanwhile lacks it, and what it drew
counts for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from fastsd.config.sections import RolloutConfig
from fastsd.serving.draw import Draw, Group
from fastsd.serving.server import RolloutError, RolloutUnavailable, ServerLost, VllmServer

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
log = logging.getLogger(__name__)

CONNECT_S = 10.0


class Fleet:
    """The servers of rollout.servers. retried: groups that were drawn again so far. ranks: how many
    processes share what a server may have under way. label: the mark of the weights given last."""

    def __init__(self, config: RolloutConfig, ranks: int = 1):
        self.concurrency = max(1, config.concurrency // ranks)
        self.tokens = math.inf
        if config.server_tokens:
            self.tokens = config.server_tokens / ranks
        self.servers = [VllmServer(url, config.timeout_s) for url in config.servers]
        self.retried = 0
        self.label = ""

    @property
    def living(self) -> list[VllmServer]:
        return [server for server in self.servers if not server.lost]

    def everywhere(
        self, use: Callable[..., Awaitable[T]], servers: Sequence[VllmServer] | None = None
    ) -> list[tuple[VllmServer, T]]:
        """use(client, server) with every server at once, or with some; who answered. The others are
        lost."""

        async def attempt(client: httpx.AsyncClient, server: VllmServer):
            try:
                found = await use(client, server)
            except ServerLost as error:
                self.lose(server, str(error))
                return []
            server.lost = None
            return [(server, found)]

        asked = self.servers if servers is None else servers
        answers = ask(lambda client: gather([attempt(client, server) for server in asked]))
        return [answer for answered in answers for answer in answered]

    def refuse_doubles(self) -> None:
        """Raises RolloutError where two addresses are one server's: each is given a mark of its
        own, and must still have it when all were given one."""
        labels = {server: _label("open") for server in self.living}
        self.everywhere(lambda client, server: server.mark(client, labels[server]), self.living)
        held = self.everywhere(
            lambda client, server: server.holds(client, labels[server]), self.living
        )
        if doubles := [server.url for server, holds in held if not holds]:
            raise RolloutError(
                f"rollout.servers: {', '.join(doubles)} was marked by another while this run began:"
                " name each server once, and give a server to one run at a time"
            )

    def load(
        self,
        give: Callable[[], None],
        version: int,
        reopen: Callable[..., Awaitable[None]],
        probe: Draw,
        vocabulary: int,
    ) -> list[tuple[VllmServer, Group]]:
        """Has `give` hand the weights to all living servers, and marks these; lost ones are
        reopened first. The answers to the probe of those that have them."""
        # Never a mark again: a server that failed half way through must not pass for a whole one.
        label = self.label = _label(str(version))
        self.everywhere(reopen, [server for server in self.servers if server.lost])
        give()

        async def renew(client: httpx.AsyncClient, server: VllmServer) -> Group:
            await server.renew(client, label)
            return await server.complete(client, probe, vocabulary)

        return self.everywhere(renew, self.living)

    def is_current(self) -> bool:
        """Whether every server that can be reached holds the weights of the last `load`. One that
        was lost and still holds them is asked again from now on."""

        async def check(client: httpx.AsyncClient, server: VllmServer) -> bool:
            try:
                holds = await server.holds(client, self.label)
            except ServerLost as error:
                self.lose(server, str(error))
                return True
            if holds:
                server.lost = None
            return holds

        held = ask(lambda client: gather([check(client, server) for server in self.servers]))
        return all(held) and bool(self.living)

    def state(self) -> tuple[str, list[str | None]]:
        """What another process's fleet of the same servers `follow`s."""
        return self.label, [server.lost for server in self.servers]

    def follow(self, state: tuple[str, list[str | None]]) -> None:
        self.label, lost = state
        for server, why in zip(self.servers, lost, strict=True):
            server.lost = why

    def draw(self, draws: Sequence[Draw], vocabulary: int) -> list[Group]:
        """The groups, in order. Raises RolloutError, RolloutUnavailable where no server is left."""
        return ask(lambda client: self._draw(client, draws, vocabulary))

    async def _draw(
        self, client: httpx.AsyncClient, draws: Sequence[Draw], vocabulary: int
    ) -> list[Group]:
        turns = _Turns(self)

        async def group(draw: Draw) -> tuple[VllmServer, Group]:
            while True:
                async with turns.of(draw) as server:
                    try:
                        return server, await server.complete(client, draw, vocabulary)
                    except ServerLost as error:
                        self.lose(server, str(error))
                        self.retried += 1

        found: dict[int, tuple[VllmServer, Group]] = {}
        left = list(range(len(draws)))
        while left:
            drawn = await gather([group(draws[i]) for i in left])
            found |= zip(left, drawn, strict=True)
            changed = await self._changed(client)
            left = [i for i, (server, _) in found.items() if server in changed]
            self.retried += len(left)
        return [found[i][1] for i in range(len(draws))]

    async def _changed(self, client: httpx.AsyncClient) -> list[VllmServer]:
        """Loses and returns the servers that hold other weights than they were given."""

        async def check(server: VllmServer) -> list[VllmServer]:
            try:
                if await server.holds(client, self.label):
                    return []
            except ServerLost as error:
                # It died after its groups; those are as good as any.
                self.lose(server, str(error))
                return []
            self.lose(server, " has other weights: it was restarted, or another run uses it")
            return [server]

        return sum(await gather([check(server) for server in self.living]), [])

    def lose(self, server: VllmServer, why: str) -> None:
        """Leaves it out until the weights are looked after again."""
        if not server.lost:
            log.warning("vLLM server %s is left out: %s", server.url, why)
        server.lost = why

    def unavailable(self, what: str) -> RolloutUnavailable:
        lost = "; ".join(f"{server.url}{server.lost}" for server in self.servers if server.lost)
        return RolloutUnavailable(f"{what}: {lost}. Start them; --resume auto continues the run")


class _Turns:
    """Gives every group its turn at a server, while it draws."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self._under_way: dict[VllmServer, list[int]] = {server: [] for server in fleet.servers}
        self._change = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def of(self, draw: Draw) -> AsyncIterator[VllmServer]:
        """The server with the fewest tokens under way, once one has room."""
        async with self._change:
            await self._change.wait_for(lambda: self._free(draw) or not self._fleet.living)
            free = self._free(draw)
            if not free:
                raise self._fleet.unavailable("no vLLM server is left")
            server = min(free, key=lambda each: sum(self._under_way[each]))
            self._under_way[server].append(draw.tokens)
        try:
            yield server
        finally:
            async with self._change:
                self._under_way[server].remove(draw.tokens)
                self._change.notify_all()

    def _free(self, draw: Draw) -> list[VllmServer]:
        return [server for server in self._fleet.living if self._has_room(server, draw)]

    def _has_room(self, server: VllmServer, draw: Draw) -> bool:
        """A group that alone is above the limit goes when nothing else is under way."""
        fleet, held = self._fleet, self._under_way[server]
        fits = sum(held) + draw.tokens <= fleet.tokens and len(held) < fleet.concurrency
        return fits or not held


def _label(name: str) -> str:
    return f"fastsd-{name}-{uuid4().hex[:12]}"


@functools.cache
def _background_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vllm", daemon=True).start()
    return loop


def ask(use: Callable[[httpx.AsyncClient], Coroutine[Any, Any, T]]) -> T:
    """use(client)'s result. It runs in a thread of its own, so that a signal ends the wait at once,
    and where the caller has a running loop too."""
    future = asyncio.run_coroutine_threadsafe(_with_client(use), _background_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _with_client(use: Callable[[httpx.AsyncClient], Coroutine[Any, Any, T]]) -> T:
    import httpx

    # Who asks limits the connections, and the server the seconds. No proxy from the environment.
    # vLLM closes a connection after an error of its own, maybe under the next request.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(None, connect=CONNECT_S)
    async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=timeout) as client:
        return await use(client)


async def gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first error ends the others before it is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
