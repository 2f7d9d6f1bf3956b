"""A group of responses: how vLLM is asked for it, and what the reply must look like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# (ids, logprobs) of each sample of a group, in order.
Group = list[tuple[list[int], list[float]]]


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
            f"a response of {len(ids)} tokens that ended by {excerpt(finish)} and not by one of "
            "this run's stop tokens or at rollout.max_new_tokens"
        )


def excerpt(value: object) -> str:
    text = str(value)
    return "".join(c if c.isprintable() else " " for c in text[:300]) or "nothing"
