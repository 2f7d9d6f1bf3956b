"""Critiques from a frozen model behind an OpenAI-compatible endpoint, and when to give up on it.

A batch of conversations is asked side by side, critic.concurrency at once, within critic.budget_s
of wall time. A request that fails in transit is tried again after a pause that doubles; what does
not come is a failure with a class of its own, never text. Three requests in a row that failed for
good, without a reply between them, are a dead critic: the rest is called off and the run ends,
resumable, with what arrived kept. A server that turns the key or the model down is not asked again.

The event loop runs in a thread of its own. Python raises a signal's exception in the main thread,
where a loop would take it for the failure of some callback; and a notebook has one there already.
"""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fastsd.config.sections import CriticConfig
from fastsd.critics.writer import WriterUnavailable
from fastsd.errors import FastsdError
from fastsd.serving.cache import Reply
from fastsd.serving.endpoint import Endpoint, RequestFailed
from fastsd.types import Conversation

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

_DEAD_AFTER = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_CHECK_S = 30.0
_PROBE = [{"role": "user", "content": "1+1="}]
T = TypeVar("T")


class ServerWriter:
    """`fastsd.critics.writer.Writer` from critic.url and critic.model.

    Raises FastsdError where the openai package is missing or the URL or key cannot be used.
    """

    def __init__(self, config: CriticConfig):
        self.config = config
        self.endpoint = Endpoint(config)
        self.name = f"server ({config.model} at {config.url})"
        self.identity = {
            "kind": "server",
            "model": config.model,
            "template_kwargs": config.template_kwargs,
            "max_tokens": config.max_tokens,
        }
        self._failed_in_a_row = 0
        self._last = ""

    def check(self) -> None:
        """Asks for the list of models, before a run does any work.

        Raises WriterUnavailable where the endpoint is out of reach or refuses, FastsdError where it
        lists models and critic.model is none of them.
        """
        names = _in_a_thread(self._models())
        if names and self.config.model not in names:
            shown = self.endpoint.printable(", ".join(repr(name) for name in names))
            raise FastsdError(
                f"critic.model = {self.config.model!r}: {self.config.url} serves {shown}"
            )

    def write(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """One reply for each conversation, in order. Raises WriterUnavailable, with the replies
        that arrived, where the critic is dead. Blocks; works beside a running event loop too."""
        if not conversations:
            return []
        replies: dict[int, Reply] = {}
        try:
            _in_a_thread(self._ask_all(conversations, replies))
            late = Reply(None, failure="over_budget")
            ordered = [replies.get(index, late) for index in range(len(conversations))]
            self._close_batch(ordered)
        except WriterUnavailable as stop:
            stop.partial = {i: reply for i, reply in replies.items() if reply.text is not None}
            raise
        return ordered

    async def _ask_all(
        self, conversations: Sequence[Conversation], replies: dict[int, Reply]
    ) -> None:
        deadline = _now() + self.config.budget_s
        waiting = iter(range(len(conversations)))
        async with self.endpoint.connect() as client:

            async def work() -> None:
                for index in waiting:
                    conversation = conversations[index]
                    replies[index] = await self._reply(client, conversation, deadline, index)

            count = min(self.config.concurrency, len(conversations))
            workers = [asyncio.create_task(work()) for _ in range(count)]
            try:
                done, _ = await asyncio.wait(
                    workers,
                    timeout=self.config.budget_s,
                    return_when=asyncio.FIRST_EXCEPTION,
                )
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        for worker in done:
            worker.result()

    async def _reply(
        self, client: AsyncOpenAI, conversation: Conversation, deadline: float, index: int
    ) -> Reply:
        try:
            reply = await self._persist(
                lambda: self.endpoint.chat(client, conversation), _read_reply, deadline, index
            )
        except RequestFailed as failure:
            self._last = str(failure)
            if _refuses(failure):
                raise self._refused(failure) from None
            self._failed_in_a_row += failure.in_transit
            if self._failed_in_a_row >= _DEAD_AFTER:
                raise self._dead(f"{self._failed_in_a_row} requests in a row failed") from None
            return Reply(None, failure=failure.kind)
        self._failed_in_a_row = 0
        return reply

    async def _persist(
        self,
        send: Callable[[], Awaitable[bytes]],
        read: Callable[[bytes], T],
        deadline: float,
        index: int = 0,
    ) -> T:
        """What `read` makes of the body, with critic.retries further attempts of what failed in
        transit; none that the server, or the pause before it, puts off beyond the deadline."""
        attempt = 0
        while True:
            try:
                return read(await send())
            except RequestFailed as failure:
                pause_s = max(failure.wait_s, _pause(attempt, index))
                late = _now() + pause_s >= deadline
                if not failure.in_transit or attempt >= self.config.retries or late:
                    raise
            await asyncio.sleep(pause_s)
            attempt += 1

    async def _models(self) -> list[str]:
        """The names that the endpoint lists; [] where it has no list but answers."""
        deadline = _now() + _CHECK_S
        async with self.endpoint.connect() as client:
            try:
                return await self._persist(
                    lambda: self.endpoint.models(client), _read_models, deadline
                )
            except RequestFailed as failure:
                if failure.status not in (404, 405):
                    raise self._unusable(failure) from None
            try:
                await self._persist(
                    lambda: self.endpoint.chat(client, _PROBE, max_tokens=1), _read_reply, deadline
                )
            except RequestFailed as failure:
                raise self._unusable(failure) from None
        return []

    def _close_batch(self, replies: Sequence[Reply]) -> None:
        """One line about a batch's failures; a batch of which nothing came in time is a death."""
        failures = Counter(reply.failure for reply in replies if reply.failure)
        if "over_budget" in failures and failures.total() == len(replies):
            raise self._dead(
                f"none of {len(replies)} replies came within critic.budget_s = "
                f"{self.config.budget_s:g} s"
            )
        if failures:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items()))
            last = f"; the last: {self._last}" if self._last else ""
            log.warning("critic: of %d replies %s%s", len(replies), counts, last)

    def _unusable(self, failure: RequestFailed) -> WriterUnavailable:
        if _refuses(failure) or failure.kind == "bad_reply":
            return self._refused(failure)
        self._last = str(failure)
        return self._dead("it cannot be used")

    def _refused(self, failure: RequestFailed) -> WriterUnavailable:
        config = self.config
        if failure.status in (401, 403):
            advice = f"check the key in the environment variable {config.api_key_env}"
        else:
            advice = "check critic.model and critic.url, which usually ends in /v1"
        return WriterUnavailable(
            f"critic {config.model!r} at {config.url} cannot be asked ({failure}); {advice}, "
            "then continue with --resume auto"
        )

    def _dead(self, what: str) -> WriterUnavailable:
        last = f" (the last: {self._last})" if self._last else ""
        return WriterUnavailable(
            f"critic {self.config.model!r} at {self.config.url}: {what}{last}; when it answers "
            "again, there or at another critic.url, continue with --resume auto"
        )


def _refuses(failure: RequestFailed) -> bool:
    """Whether no other request can do better: a wrong key, model or path, or a redirect."""
    status = failure.status
    return status is not None and (status in (401, 403, 404) or status < 400)


def _pause(attempt: int, index: int) -> float:
    """Seconds before the next attempt: doubling, less up to half by index: not all at once."""
    longest = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
    return longest * (1 - zlib.crc32(f"{attempt} {index}".encode()) / 2**33)


def _read_reply(body: bytes) -> Reply:
    """The first choice of a chat completion. Raises RequestFailed ("bad_reply")."""
    found = _read_json(body)
    try:
        choice = found["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise _bad("it is no chat completion") from None
    # A reasoning model that spent its tokens has no content: null.
    text = "" if text is None else text
    if not isinstance(text, str) or not isinstance(reason, str | None):
        raise _bad("its content is no text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _bad("its content holds half a character") from None
    return Reply(text, truncated=reason == "length")


def _read_models(body: bytes) -> list[str]:
    found = _read_json(body)
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        raise _bad("it is no list of models")
    return [str(one["id"]) for one in found["data"] if isinstance(one, dict) and "id" in one]


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise _bad("it is not UTF-8") from None
    except (ValueError, RecursionError):
        raise _bad("it is not JSON") from None


def _bad(text: str) -> RequestFailed:
    return RequestFailed("bad_reply", text, in_transit=False)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _in_a_thread(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end in a thread with its own event loop; an exception that reaches
    the waiting thread, such as a signal's, calls it off."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def drive() -> T:
        try:
            return loop.run_until_complete(task)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())

    try:
        with ThreadPoolExecutor(1, "critic") as pool:
            try:
                return pool.submit(drive).result()
            except BaseException:
                loop.call_soon_threadsafe(task.cancel)
                raise
    finally:
        loop.close()
