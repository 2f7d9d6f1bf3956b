"""One vLLM server over HTTP: what it is asked, and what its replies must look like.

Token ids go out and come back, never text, so that both sides cannot disagree on a token. A reply
is believed after it was checked: a server of another model, or one that answers nonsense, ends the
run with a clear error, while one that cannot be reached or fails is lost (`ServerLost`), and the
sampler asks another.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError
from fastsd.serving.draw import Draw, Group, excerpt, read_group

if TYPE_CHECKING:
    import httpx

# Seconds for a whole reply: the answer to a small question, new weights.
SHORT_S, WEIGHTS_S = 30.0, 600.0
RESET_PAUSES_S = (0.1, 0.5, 2.0, 5.0)
# A token of a reply takes some 100 bytes; whatever is longer than this is not one.
LONGEST_REPLY = 256 * 2**20
DEVELOPER_PATHS = (
    *("/collective_rpc", "/reset_prefix_cache"),
    *("/update_weight_version", "/weight_info", "/server_info", "/get_world_size"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"),
    *("/start_weight_update", "/update_weights", "/finish_weight_update"),
)
NO_DEVELOPER_MODE = "start it, vLLM 0.32 or newer, with VLLM_SERVER_DEV_MODE=1 in its environment"


class RolloutError(FastsdError):
    """A vLLM server that this run cannot use: another model, other settings, wrong replies."""


class RolloutUnavailable(FastsdError):
    """No vLLM server is left to sample from."""

    exit_code = 3


class ServerLost(Exception):
    """This server cannot be reached or failed; another may do. Never leaves the sampler."""


class VllmServer:
    """A server by its base URL. lost: why it is not asked any more; None while it is. timeout_s:
    the longest wait for a group."""

    def __init__(self, url: str, timeout_s: float):
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s = timeout_s
        self.model = ""
        self.lost: str | None = None
        self._has_loaded = False
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise RolloutError(f"rollout.servers: {url!r} is not a URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            wanted = "http://HOST:PORT, e.g. http://127.0.0.1:8000"
            raise RolloutError(f"rollout.servers: found {url!r}, must be {wanted}")

    async def open(self, client: httpx.AsyncClient, length: int, text: str, ids: list[int]) -> None:
        """Checks that it serves sequences of `length` tokens and that `text` is `ids` to it.

        Raises RolloutError for a server that this run cannot use, ServerLost.
        """
        listed = await self._ask(client, "GET", "/v1/models")
        try:
            model = listed["data"][0]
            self.model, limit = str(model["id"]), int(model["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            what = "lists no model with max_model_len, as vLLM's does"
            raise self._nonsense("/v1/models", what) from error
        if limit < length:
            raise RolloutError(
                f"{self.url} serves sequences of {limit} tokens, and prompt.max_prompt_tokens with "
                f"rollout.max_new_tokens make {length}: start it with --max-model-len {length}, or "
                "lower one of the two"
            )
        question = {"model": self.model, "prompt": text, "add_special_tokens": False}
        reply = await self._ask(client, "POST", "/tokenize", question)
        found = reply.get("tokens") if isinstance(reply, dict) else None
        if found != ids:
            raise RolloutError(
                f"{self.url} serves {self.model!r} with another tokenizer than this run's model: "
                f"{text!r} is {excerpt(found)} to it and {ids} here; serve the folder or model of "
                "model.name"
            )

    async def load_weights(self, client: httpx.AsyncClient, folder: Path) -> None:
        """Replaces the weights by those in a Hugging Face folder that the server can read too."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        found = f", where {folder} can be read"
        await self._load(client, "/collective_rpc", call, WEIGHTS_S, found)

    async def transfer(
        self, client: httpx.AsyncClient, call: str, timeout: float, body: dict | None = None
    ) -> None:
        """One call of vLLM's weight transfer, e.g. "start_weight_update"."""
        await self._ask(client, "POST", f"/{call}", body, timeout)

    async def take_weights(
        self, client: httpx.AsyncClient, update_info: dict[str, Any], timeout: float
    ) -> None:
        """Has the server's workers take the tensors that are broadcast meanwhile."""
        await self._load(client, "/update_weights", {"update_info": update_info}, timeout)

    async def _load(
        self, client: httpx.AsyncClient, path: str, body: dict, timeout: float, where: str = ""
    ) -> None:
        try:
            await self._ask(client, "POST", path, body, timeout)
        except ServerLost as error:
            if self._has_loaded or "HTTP 500" not in str(error):
                raise
            raise RolloutError(
                f"{self.url} cannot load this run's weights: serve the model of model.name{where} "
                f"({error})"
            ) from error
        self._has_loaded = True

    async def transfer_backend(self, client: httpx.AsyncClient) -> str | None:
        """The backend of weight transfer that it was started with; None for none."""
        # Collecting the environment, which this page shows too, takes vLLM some seconds.
        path = "/server_info?config_format=json"
        reply = await self._ask(client, "GET", path, None, WEIGHTS_S)
        try:
            found = reply["vllm_config"].get("weight_transfer_config")
            return None if found is None else str(found["backend"])
        except (AttributeError, KeyError, TypeError) as error:
            raise self._nonsense(path, f"no vllm_config as vLLM's: {error!r}") from error

    async def workers(self, client: httpx.AsyncClient) -> int:
        """How many workers hold its weights, each a member of a transfer's group."""
        reply = await self._ask(client, "GET", "/get_world_size")
        size = reply.get("world_size") if isinstance(reply, dict) else None
        if type(size) is not int or size < 1:
            raise self._nonsense("/get_world_size", f"{excerpt(reply)} names no world_size")
        return size

    async def mark(self, client: httpx.AsyncClient, label: str) -> None:
        """Marks the weights that it has with `label`, until it has others or is restarted."""
        await self._ask(client, "POST", "/update_weight_version", {"new_version": label})

    async def renew(self, client: httpx.AsyncClient, label: str) -> None:
        """Forgets the keys and values of former weights, and marks the present ones."""
        for pause_s in RESET_PAUSES_S:
            reply = await self._ask(client, "POST", "/reset_prefix_cache", None, WEIGHTS_S)
            if reply == {"success": True}:
                await self.mark(client, label)
                return
            # Requests that a client hung up on hold their blocks a moment longer.
            await asyncio.sleep(pause_s)
        why = "it keeps the old weights' prefixes; is another run using it?"
        raise self._nonsense("/reset_prefix_cache", why)

    async def holds(self, client: httpx.AsyncClient, label: str) -> bool:
        """Whether its weights are marked so."""
        reply = await self._ask(client, "GET", "/weight_info")
        if not isinstance(reply, dict) or not isinstance(reply.get("weight_version"), str):
            raise self._nonsense("/weight_info", f"{excerpt(reply)} names no weight_version")
        return reply["weight_version"] == label

    async def complete(self, client: httpx.AsyncClient, draw: Draw, vocabulary: int) -> Group:
        """(ids, logprobs) of each sample, in order. Raises RolloutError, ServerLost."""
        path = "/v1/completions"
        reply = await self._ask(client, "POST", path, draw.body(self.model), self.timeout_s)
        try:
            return read_group(reply, draw, vocabulary)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._nonsense(path, f"{type(error).__name__}: {error}") from error

    async def _ask(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body=None,
        timeout: float | None = None,
    ) -> Any:
        status, content = await self._exchange(client, method, path, body, timeout or SHORT_S)
        text = content.decode(errors="replace")
        if status >= 500 or status == 429:
            raise ServerLost(f"{path} answered HTTP {status}: {excerpt(text)}")
        if status == 404 and path.partition("?")[0] in DEVELOPER_PATHS:
            raise RolloutError(f"{self.url} has no {path}: {NO_DEVELOPER_MODE}")
        if status != 200:
            raise RolloutError(f"{self.url}{path} answered HTTP {status}: {excerpt(text)}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._nonsense(path, f"{excerpt(text)} is not JSON") from error

    async def _exchange(
        self, client: httpx.AsyncClient, method: str, path: str, body, timeout: float
    ) -> tuple[int, bytes]:
        """Status and body; the whole takes no longer than `timeout`, however it drips."""
        import httpx

        content = bytearray()
        try:
            async with (
                asyncio.timeout(timeout),
                client.stream(method, self.url + path, json=body) as response,
            ):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > LONGEST_REPLY:
                        raise self._nonsense(path, f"is longer than {LONGEST_REPLY} bytes")
        except TimeoutError as error:
            raise ServerLost(f"{path} gave no whole reply in {timeout:.0f} s") from error
        except httpx.HTTPError as error:
            raise ServerLost(f"{path}: {type(error).__name__}: {excerpt(error)}") from error
        return response.status_code, bytes(content)

    def _nonsense(self, path: str, what: str) -> RolloutError:
        return RolloutError(f"the reply of {self.url}{path} cannot be used: {what}")
