"""One request to an OpenAI-compatible endpoint: the body of its reply, or a failure with a name.

The `openai` package speaks the protocol, with its retries and timeouts off: ours bound an attempt
from the first byte sent to the last received, which theirs, one per read, do not. A body is read
up to a size and never unpacked, so memory is bounded whatever the server sends. A conversation and
the key go to critic.url and nowhere else: no redirect is followed, and for a server on this machine
no proxy of the environment is used.
"""

from __future__ import annotations

import asyncio
import email.utils
import importlib
import ipaddress
import json
import math
import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastsd.config.sections import CriticConfig
from fastsd.errors import FastsdError
from fastsd.types import Conversation

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_CONNECT_S = 10.0
# JSON around a reply, and what one token of it takes at most, escaped.
_BYTES, _BYTES_PER_TOKEN = 1_000_000, 64
_ERROR_BYTES = 65_536
_SHOWN = 300


class RequestFailed(Exception):
    """An attempt without a usable reply.

    kind: timeout, rate_limited, server_error, client_error, connection or bad_reply. in_transit:
    another attempt may succeed; then wait_s is how long the server wants to be left alone. status:
    the HTTP status, where one came. The text is printable and holds no key.
    """

    def __init__(
        self,
        kind: str,
        text: str,
        *,
        in_transit: bool,
        wait_s: float = 0.0,
        status: int | None = None,
    ):
        super().__init__(f"{kind}: {text}")
        self.kind, self.in_transit, self.wait_s, self.status = kind, in_transit, wait_s, status


class Endpoint:
    """critic.url, critic.model and the key. Raises FastsdError where they cannot be used."""

    def __init__(self, config: CriticConfig):
        self.config = config
        self._openai = _import_openai()
        self._loopback = _is_loopback(config.url)
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise FastsdError(
                f"the environment variable {config.api_key_env} (critic.api_key_env) holds "
                "characters that no key has, such as a line break: set it anew"
            )
        self._limit = _BYTES + _BYTES_PER_TOKEN * config.max_tokens

    def connect(self) -> AsyncOpenAI:
        """A client for `async with`, in the running event loop."""
        # openai went from httpx to its successor: which one it builds on, its own client says.
        base = self._openai.DefaultAsyncHttpxClient.__mro__[1]
        httpx = importlib.import_module(base.__module__.partition(".")[0])
        return self._openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.config.url,
            max_retries=0,
            timeout=self._openai.Timeout(None, connect=_CONNECT_S),
            default_headers={"Accept-Encoding": "identity"},
            http_client=self._openai.DefaultAsyncHttpxClient(
                follow_redirects=False,
                trust_env=not self._loopback,
                event_hooks={"response": [_bounded(httpx, self._limit)]},
            ),
        )

    async def chat(
        self, client: AsyncOpenAI, conversation: Conversation, max_tokens: int | None = None
    ) -> bytes:
        """The body of a greedy chat completion. Raises RequestFailed."""
        kwargs = self.config.template_kwargs
        messages: Any = conversation
        call = client.chat.completions.with_raw_response.create(
            model=self.config.model,
            messages=messages,
            temperature=0.0,
            max_tokens=max_tokens or self.config.max_tokens,
            extra_body={"chat_template_kwargs": kwargs} if kwargs else None,
        )
        return await self._body(call, self.config.timeout_s)

    async def models(self, client: AsyncOpenAI) -> bytes:
        """The body of the list of models. Raises RequestFailed."""
        timeout_s = min(self.config.timeout_s, _CONNECT_S)
        return await self._body(client.models.with_raw_response.list(), timeout_s)

    def printable(self, text: str) -> str:
        """Foreign text for a message: one short line of printable characters, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
        return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."

    async def _body(self, call: Awaitable[Any], timeout_s: float) -> bytes:
        openai = self._openai
        try:
            async with asyncio.timeout(timeout_s):
                return (await call).http_response.content
        except TimeoutError:
            text = f"no whole reply within {timeout_s:g} s"
            raise RequestFailed("timeout", text, in_transit=True) from None
        except openai.APITimeoutError:
            text = f"none within {_CONNECT_S:g} s"
            raise RequestFailed("connection", text, in_transit=True) from None
        except openai.APIStatusError as error:
            raise self._status_failure(error.response) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, RequestFailed):  # of _bounded: older clients wrap it
                raise cause from None
            text = self.printable(str(cause) or type(cause).__name__)
            raise RequestFailed("connection", text, in_transit=True) from None

    def _status_failure(self, response: Any) -> RequestFailed:
        status = response.status_code
        kinds = {408: "timeout", 429: "rate_limited"}
        kind = kinds.get(status, "server_error" if status >= 500 else "client_error")
        text = self.printable(f"{status} {_error_text(response.content)}")
        wait_s = _retry_after(response.headers.get("retry-after", ""))
        in_transit = kind != "client_error"
        return RequestFailed(kind, text, in_transit=in_transit, wait_s=wait_s, status=status)


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise FastsdError(
            f'critic.kind = "server" needs the openai package ({error}): pip install '
            "'fastsd[critic]'"
        ) from error
    return openai


def _is_loopback(url: str) -> bool:
    """Whether critic.url is on this machine; FastsdError where it is no URL that can be asked."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise FastsdError(f"critic.url = {url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        example = "http://127.0.0.1:8000/v1"
        raise FastsdError(f"critic.url = {url!r} is not an http(s) URL such as {example}")
    if parts.username or parts.password:
        raise FastsdError(
            "critic.url holds a user name or password, which run folders would show: put the key "
            "into the environment variable that critic.api_key_env names"
        )
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _bounded(httpx: Any, limit: int) -> Callable[[Any], Awaitable[None]]:
    """A response hook: bodies are not unpacked, and end in RequestFailed where they break off or
    pass `limit` bytes. Those of errors, of which the beginning makes a message, just end."""

    class Body(httpx.AsyncByteStream):
        def __init__(self, stream: Any, of_error: bool):
            self.stream, self.of_error = stream, of_error
            self.limit = _ERROR_BYTES if of_error else limit

        async def __aiter__(self):
            size = 0
            try:
                async for chunk in self.stream:
                    size += len(chunk)
                    if size > self.limit:
                        break
                    yield chunk
            except httpx.RequestError as error:
                if not self.of_error:
                    text = f"it broke off after {size} bytes"
                    raise RequestFailed("bad_reply", text, in_transit=True) from error
            if size > self.limit and not self.of_error:
                text = f"longer than {self.limit} bytes"
                raise RequestFailed("bad_reply", text, in_transit=False)

        async def aclose(self) -> None:
            await self.stream.aclose()

    async def hook(response: Any) -> None:
        # Nothing packed was asked for: what comes packed all the same is looked at as it is.
        response.headers.pop("content-encoding", None)
        response.stream = Body(response.stream, of_error=response.status_code >= 300)

    return hook


def _error_text(body: bytes) -> str:
    """The message in an error's body: OpenAI's {"error": {"message"}} and its variants, else the
    text."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    while isinstance(found, dict):
        found = next((found[k] for k in ("error", "message", "detail") if k in found), None)
    return found if isinstance(found, str) else text


def _retry_after(value: str) -> float:
    """Seconds from now of a Retry-After header, a number or a date; 0 where it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
