"""Prompts to responses: the in-process sampler.

Each question is prefilled once; its G branches decode against that one copy of keys and values.
Random numbers are counters, not streams: u = hash(key, prompt, sample, position), so a rollout
does not depend on what else is in the batch, on the batch size, or on a resume.

Shapes: P prompts, B rows (branches), D hidden.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastsd.attention import BranchCache
from fastsd.config import RolloutConfig
from fastsd.render import PromptRenderer
from fastsd.types import FastsdError, Prompt, Rollout
from fastsd_kernels import sample_tokens

# Rows are dropped from the batch once this share of them has finished.
_COMPACT_AT = 0.25


class Sampler:
    """Samples responses from a policy. `sample` is all that another engine must implement."""

    def __init__(self, policy, renderer: PromptRenderer, config: RolloutConfig):
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
        """
        temperature = self.config.temperature if temperature is None else temperature
        head_VD = self.policy.head_VD.detach().float()
        counters = row_counters(key, prompts, samples)
        rollouts: list[Rollout] = []
        per_batch = max(1, self.config.batch_rows // samples)
        for start in range(0, len(prompts), per_batch):
            group = prompts[start : start + per_batch]
            counter_B = counters[start * samples : (start + per_batch) * samples]
            decoded = _Decoding(self, group, samples, counter_B, temperature, head_VD).run()
            for row, (ids, logprobs) in enumerate(decoded):
                rollouts.append(self._rollout(group[row // samples], row % samples, ids, logprobs))
        return rollouts

    def _rollout(self, prompt: Prompt, sample: int, ids: list, logprobs: list) -> Rollout:
        stopped = ids[-1] in self.stop_ids
        text = self.policy.tokenizer.decode(
            ids[:-1] if stopped else ids,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return Rollout(prompt, sample, tuple(ids), tuple(logprobs), text, truncated=not stopped)


@dataclass
class _Decoding:
    """One batch of branches from prefill to the last stop token."""

    sampler: Sampler
    prompts: Sequence[Prompt]
    samples: int
    counter_B: np.ndarray
    temperature: float
    head_VD: torch.Tensor

    def run(self) -> list[tuple[list[int], list[float]]]:
        policy, config = self.sampler.policy, self.sampler.config
        prompt_ids = [self.sampler.renderer.student(prompt) for prompt in self.prompts]
        policy.check_length(max(map(len, prompt_ids)) + config.max_new_tokens)
        cache, hidden_PD = self._prefill(prompt_ids)
        hidden_BD = hidden_PD.repeat_interleave(self.samples, 0)
        start_B = np.repeat([len(ids) for ids in prompt_ids], self.samples)
        counter_B = self.counter_B
        outputs: list[tuple[list[int], list[float]]] = [([], []) for _ in counter_B]
        # row_B[i] is the output row that the batch's i-th row writes; alive_B: still unfinished.
        row_B, alive_B = np.arange(len(counter_B)), np.ones(len(counter_B), bool)
        stop_ids = np.array(sorted(self.sampler.stop_ids))
        for position in range(config.max_new_tokens):
            token_B, logprob_B = self._draw(hidden_BD, uniform(counter_B[row_B], position))
            for index in np.flatnonzero(alive_B):
                ids, logprobs = outputs[row_B[index]]
                ids.append(int(token_B[index]))
                logprobs.append(float(logprob_B[index]))
            alive_B = alive_B & ~np.isin(token_B, stop_ids)
            if not alive_B.any() or position + 1 == config.max_new_tokens:
                break
            if alive_B.mean() <= 1 - _COMPACT_AT:
                kept = np.flatnonzero(alive_B)
                cache.keep(torch.from_numpy(kept).to(policy.device))
                row_B, token_B, alive_B = row_B[kept], token_B[kept], alive_B[kept]
            hidden_BD = self._decode(cache, token_B, start_B[row_B] + position)
        return outputs

    def _prefill(self, prompt_ids):
        policy = self.sampler.policy
        cache, hidden_PLD, length_P = policy.prefill(prompt_ids)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        branches = BranchCache(layers, length_P, self.samples, self.sampler.config.max_new_tokens)
        return branches, hidden_PLD[torch.arange(len(prompt_ids)), length_P - 1]

    def _draw(self, hidden_BD, uniform_B) -> tuple[np.ndarray, np.ndarray]:
        policy, config = self.sampler.policy, self.sampler.config
        token_B, logprob_B = sample_tokens(
            hidden_BD,
            self.head_VD,
            torch.from_numpy(uniform_B).to(policy.device),
            temperature=self.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            **policy.head_options(),
        )
        return token_B.cpu().numpy(), logprob_B.cpu().numpy()

    def _decode(self, cache: BranchCache, token_B: np.ndarray, position_B: np.ndarray):
        policy = self.sampler.policy
        out = policy.decoder(
            input_ids=torch.from_numpy(token_B)[:, None].to(policy.device),
            position_ids=torch.from_numpy(position_B)[:, None].to(policy.device),
            branch_cache=cache,
            use_cache=False,
        )
        cache.length += 1
        return out.last_hidden_state[:, 0]


def stop_token_ids(policy, extra: Sequence[str]) -> frozenset[int]:
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


def uniform(counter_B: np.ndarray, position: int) -> np.ndarray:
    """Uniform float64 numbers in [0, 1) with 53 random bits, one per counter."""
    # Arrays wrap around silently, as a counter should; numpy's scalars warn.
    offset = np.array([position + 1], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(counter_B + offset)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
