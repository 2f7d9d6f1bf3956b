"""One vLLM server over HTTP: what it is asked, and what its replies must look like.

Token ids go out and come back, never text, so that both sides cannot disagree on a token. A reply
is believed after it was checked: a server of another model, or one that answers nonsense, ends the
run with a clear error, while one that cannot be reached or fails is lost (`ServerLost`), and the
sampler asks another.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.types import FastsdError

if TYPE_CHECKING:
    import httpx

# (ids, logprobs) of each sample of a group, in order.
Group = list[tuple[list[int], list[float]]]
# Seconds for a whole reply: the answer to a small question, new weights.
SHORT_S, WEIGHTS_S = 30.0, 600.0
RESET_PAUSES_S = (0.1, 0.5, 2.0, 5.0)
# A token of a reply takes some 100 bytes; whatever is longer than this is not one.
LONGEST_REPLY = 256 * 2**20
DEVELOPER_PATHS = (
    *("/collective_rpc", "/reset_prefix_cache"),
    *("/update_weight_version", "/weight_info"),
)
NO_DEVELOPER_MODE = "start it, vLLM 0.32 or newer, with VLLM_SERVER_DEV_MODE=1 in its environment"


class RolloutError(FastsdError):
    """A vLLM server that this run cannot use: another model, other settings, wrong replies."""


class RolloutUnavailable(FastsdError):
    """No vLLM server is left to sample from."""

    exit_code = 3


class ServerLost(Exception):
    """This server cannot be reached or failed; another may do. Never leaves the sampler."""


@dataclass(frozen=True)
class Draw:
    """A group of responses that is asked for: `samples` continuations of one prompt."""

    prompt_ids: tuple[int, ...]
    samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_ids: frozenset[int]
    seed: int

    @property
    def tokens(self) -> int:
        """The most that a server holds for it: the prompt once, and every response."""
        return len(self.prompt_ids) + self.samples * self.max_new_tokens

    def body(self, model: str) -> dict[str, Any]:
        """The request. What the server's generation config would set is set here, and `ignore_eos`
        leaves our stop ids as the only ones."""
        return {
            "model": model,
            "prompt": list(self.prompt_ids),
            "n": self.samples,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stop_token_ids": sorted(self.stop_ids),
            "seed": self.seed,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }


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
                f"{text!r} is {_excerpt(found)} to it and {ids} here; serve the folder or model of "
                "model.name"
            )

    async def load_weights(self, client: httpx.AsyncClient, folder: Path, label: str) -> None:
        """Replaces the weights by those in a Hugging Face folder that the server can read too,
        forgets keys and values of the old ones, and marks the new ones with `label`."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            await self._ask(client, "POST", "/collective_rpc", call, WEIGHTS_S)
        except ServerLost as error:
            if self._has_loaded or "HTTP 500" not in str(error):
                raise
            raise RolloutError(
                f"{self.url} cannot load this run's weights: serve the model of model.name, where "
                f"{folder} can be read ({error})"
            ) from error
        self._has_loaded = True
        for pause_s in RESET_PAUSES_S:
            reply = await self._ask(client, "POST", "/reset_prefix_cache", None, WEIGHTS_S)
            if reply == {"success": True}:
                await self._ask(client, "POST", "/update_weight_version", {"new_version": label})
                return
            # Requests that a client hung up on hold their blocks a moment longer.
            await asyncio.sleep(pause_s)
        why = "it keeps the old weights' prefixes; is another run using it?"
        raise self._nonsense("/reset_prefix_cache", why)

    async def holds(self, client: httpx.AsyncClient, label: str) -> bool:
        """Whether its weights are those that `load_weights` marked so."""
        reply = await self._ask(client, "GET", "/weight_info")
        if not isinstance(reply, dict) or not isinstance(reply.get("weight_version"), str):
            raise self._nonsense("/weight_info", f"{_excerpt(reply)} names no weight_version")
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
        self, client: httpx.AsyncClient, method: str, path: str, body=None, timeout: float = SHORT_S
    ) -> Any:
        status, content = await self._exchange(client, method, path, body, timeout)
        text = content.decode(errors="replace")
        if status >= 500 or status == 429:
            raise ServerLost(f"{path} answered HTTP {status}: {_excerpt(text)}")
        if status == 404 and path in DEVELOPER_PATHS:
            raise RolloutError(f"{self.url} has no {path}: {NO_DEVELOPER_MODE}")
        if status != 200:
            raise RolloutError(f"{self.url}{path} answered HTTP {status}: {_excerpt(text)}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._nonsense(path, f"{_excerpt(text)} is not JSON") from error

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
            raise ServerLost(f"{path}: {type(error).__name__}: {_excerpt(error)}") from error
        return response.status_code, bytes(content)

    def _nonsense(self, path: str, what: str) -> RolloutError:
        return RolloutError(f"the reply of {self.url}{path} cannot be used: {what}")


def read_group(reply: Any, draw: Draw, vocabulary: int) -> Group:
    """(ids, logprobs) of each sample. Raises KeyError, TypeError or ValueError saying what is wrong
    with the reply: nothing of it is taken on trust."""
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(draw.samples)):
        raise ValueError(f"{len(choices)} choices for n = {draw.samples}")
    if list(choices[0]["prompt_token_ids"]) != list(draw.prompt_ids):
        raise ValueError("it answers another prompt's token ids")
    group = []
    for choice in choices:
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        _check_response(ids, logprobs, choice["finish_reason"], draw, vocabulary)
        group.append((ids, [min(0.0, float(logprob)) for logprob in logprobs]))
    return group


def _check_response(ids, logprobs, finish: str, draw: Draw, vocabulary: int) -> None:
    if not ids or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise ValueError(f"token ids outside the {vocabulary} of this run's model, or none")
    if len(logprobs) != len(ids) or not all(map(math.isfinite, logprobs)):
        raise ValueError(f"{len(logprobs)} log-probs for {len(ids)} tokens, or one not finite")
    if max(logprobs) > 1e-3:
        raise ValueError(
            f"{max(logprobs)} as a log-prob: start it without --logprobs-mode *_logits"
        )
    stops = [i in draw.stop_ids for i in ids]
    whole = len(ids) == draw.max_new_tokens
    ended = {"stop": stops[-1], "length": whole and not stops[-1]}.get(finish, False)
    if any(stops[:-1]) or not ended or len(ids) > draw.max_new_tokens:
        raise ValueError(
            f"a response of {len(ids)} tokens that ended by {_excerpt(finish)} and not by one of "
            "this run's stop tokens or at rollout.max_new_tokens"
        )


def _excerpt(value: object) -> str:
    text = str(value)
    return "".join(c if c.isprintable() else " " for c in text[:300]) or "nothing"
