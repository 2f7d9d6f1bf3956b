"""Prompts to responses: the in-process sampler.

`decoding.Decoding` keeps the batch full; here a token is drawn and becomes text. Random numbers are
counters, not streams: u = hash(key, prompt, sample, position), so a rollout does not depend on what
else is in the batch, on the batch size, or on a resume.

Shapes: B rows under way, D hidden, Q questions, S samples per question.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastsd.config.sections import RolloutConfig
from fastsd.errors import FastsdError
from fastsd.model import Policy
from fastsd.model.packed_layers import packed_layers, packed_layers_name
from fastsd.parallel.placement import OneProcess
from fastsd.prompts.render import PromptRenderer
from fastsd.rollout.decoding import Decoding, Rows
from fastsd.types import Prompt, Rollout, StepMetrics
from fastsd_kernels import sample_from_logits


class Sampler:
    """Samples responses from a policy: what other engines (`fastsd.rollout.vllm`) do otherwise."""

    def __init__(self, policy: Policy, renderer: PromptRenderer, config: RolloutConfig):
        self.policy = policy
        self.renderer = renderer
        self.config = config
        self.stop_ids = stop_token_ids(policy, config.stop)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        key: tuple[int, ...],
        temperature: float | None = None,
    ) -> list[Rollout]:
        """`samples` responses per prompt, grouped by prompt.

        key: integers that name this draw (seed, step, ...); the same key gives the same rollouts
        whatever the batching. temperature: config.temperature unless given.

        Raises ModelError for a prompt too long for the model, before anything is sampled.
        """
        if not prompts:
            return []
        policy, config = self.policy, self.config
        prompt_ids = [self.renderer.student(prompt) for prompt in prompts]
        policy.check_length(max(map(len, prompt_ids)) + config.max_new_tokens)
        counter_QS = row_counters(key, prompts, samples).reshape(len(prompts), samples)
        temperature = config.temperature if temperature is None else temperature
        with packed_layers(policy) as logits:
            draw = functools.partial(self._draw, logits, counter_QS, temperature)
            decoding = Decoding(
                policy,
                prompt_ids,
                samples,
                config.batch_rows,
                config.max_new_tokens,
                self.stop_ids,
                draw,
                fixed=policy.device.type == "cuda",
            )
            responses = decoding.run()
        return [
            self._rollout(prompt, sample, *responses.of(question, sample))
            for question, prompt in enumerate(prompts)
            for sample in range(samples)
        ]

    @property
    def name(self) -> str:
        """The engine in one clause, for the run's header."""
        return f"{packed_layers_name(self.policy)}, in-process, shared prefixes"

    def update_weights(
        self, version: int, staleness: int = 0, placement: OneProcess | None = None
    ) -> None:
        """Samples come from the weights of this version from now on, or of at most `staleness`
        before it: here they are always the present ones. placement: of the policy's weights."""

    def metrics(self) -> StepMetrics:
        """Numbers about the engine since the last update of the weights."""
        return {}

    def _draw(
        self,
        logits: Callable[[Tensor], Tensor],
        counter_QS: np.ndarray,
        temperature: float,
        hidden_BD: Tensor,
        rows: Rows,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(token_B, logprob_B): the next token of every row."""
        uniform_B = uniform(counter_QS[rows.question_B, rows.sample_B], rows.count_B)
        token_B, logprob_B = sample_from_logits(
            logits(hidden_BD),
            torch.from_numpy(uniform_B).to(self.policy.device),
            temperature=temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            **self.policy.head_options(),
        )
        return token_B.cpu().numpy(), logprob_B.cpu().numpy()

    def _rollout(self, prompt: Prompt, sample: int, ids: list, logprobs: list) -> Rollout:
        stopped = ids[-1] in self.stop_ids
        text = self.policy.tokenizer.decode(
            ids[:-1] if stopped else ids,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return Rollout(prompt, sample, tuple(ids), tuple(logprobs), text, truncated=not stopped)


def stop_token_ids(policy: Policy, extra: Sequence[str]) -> frozenset[int]:
    """Ids that end a response: the generation config's end-of-sequence ids and `extra` tokens."""
    configured = policy.model.generation_config.eos_token_id
    if configured is None:
        configured = policy.tokenizer.eos_token_id
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    for token in extra:
        token_id = policy.tokenizer.get_vocab().get(token)
        if token_id is None:
            raise FastsdError(f"rollout.stop: {token!r} is not a single token of this tokenizer")
        ids.add(token_id)
    if not ids:
        raise FastsdError("no stop token: the model names no eos_token_id; give rollout.stop")
    return frozenset(ids)


def row_counters(key: tuple[int, ...], prompts: Sequence[Prompt], samples: int) -> np.ndarray:
    """One 64-bit counter base per (prompt, sample), grouped by prompt.

    A prompt that is listed twice gets other numbers the second time.
    """
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        names.append(f"{seen[prompt.id]}:{prompt.id}".encode())
        seen[prompt.id] += 1
    base = np.array([0x9E3779B97F4A7C15], np.uint64)
    for part in key:
        base = _mix(base ^ np.uint64(part & (2**64 - 1)))
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    prompt_P = _mix(base ^ np.array([int.from_bytes(d, "little") for d in digests], np.uint64))
    return _mix(prompt_P[:, None] ^ np.arange(samples, dtype=np.uint64)).reshape(-1)


def uniform(counter_B: np.ndarray, position_B: np.ndarray) -> np.ndarray:
    """Uniform float64 numbers in [0, 1) with 53 random bits, one per counter and position."""
    # Arrays wrap around silently, as a counter should; numpy's scalars warn.
    offset = (position_B + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(counter_B + offset)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
