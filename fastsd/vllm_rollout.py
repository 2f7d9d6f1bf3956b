"""Prompts to responses: vLLM servers over HTTP, behind the in-process sampler's protocol.

The groups of a step go round the servers, each in one request, so that a server computes its prompt
once. A server that fails is left out and its groups are drawn elsewhere, until the next update of
the weights finds it back.

Responses are on-policy only if the servers hold this run's weights. `update_weights` writes them as
a Hugging Face folder that the servers can read, has them reloaded and the prefix caches emptied,
and then compares a probe: the log-probs of a served response against the policy's own forward. That
catches servers of another model, stale weights, and log-probs of another kind; two roundings of
the same weights lie far below `PROBE_TOLERANCE`. A server belongs to one run at a time.

Rollout.logprobs are log p at the sampling temperature before top-k and top-p. vLLM returns log p
of the raw logits or of what it samples from (--logprobs-mode), so a temperature beside 1 together
with top-k or top-p is refused, and a draw at another temperature than rollout.temperature (an
evaluation) has NaN for log-probs. Seeds are given, but servers do not round alike whatever the
batch: a resumed run continues with the same weights and prompts, not with the same responses.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from fastsd.refusals import longest_sequence
from fastsd.render import PromptRenderer
from fastsd.rollout import Sampler, row_counters
from fastsd.sections import RolloutConfig
from fastsd.sync import remove_others, write_weights
from fastsd.types import Branch, Prompt, Rollout, StepMetrics, TokenTree
from fastsd.vllm_server import (
    Draw,
    RolloutError,
    RolloutUnavailable,
    ServerLost,
    VllmServer,
    ask,
    gather,
)
from fastsd_kernels import fused_linear_statistics

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
log = logging.getLogger(__name__)

# Groups under way at one server; more wait here.
GROUPS_PER_SERVER = 32
# Mean |log-prob difference| per token of the probe, in nats. Measured on SmolLM2-135M: 0.02 to 0.05
# between a bf16 server and a bf16 or fp32 policy; 0.4 and more for a head that is off by a tenth.
PROBE_TOLERANCE = 0.1
PROBE_TOKENS = 64
_PROBE_TEXT = "What is 17 + 25? Say it in words: \u00e9, \u6f22\u5b57.\n"


class VllmSampler(Sampler):
    """Samples responses from vLLM servers that are given the policy's weights.

    folder: where the weights are written for them. Opening asks every server for its model, longest
    sequence and tokenizer. Raises RolloutError for settings or servers that this run cannot use,
    RolloutUnavailable for servers that do not answer.
    """

    def __init__(self, policy, renderer: PromptRenderer, config: RolloutConfig, folder: Path):
        super().__init__(policy, renderer, config)
        _refuse_settings(config)
        self.folder = folder.resolve()
        self.servers = [VllmServer(url) for url in config.servers]
        self.version: int | None = None
        self._metrics: StepMetrics = {}
        self._everywhere(self._open)
        if any(server.lost for server in self.servers):
            raise self._unavailable("rollout.servers: not all answer")

    @property
    def name(self) -> str:
        return f"vLLM, {len(self.servers)} server{'s' * (len(self.servers) > 1)}"

    def metrics(self) -> StepMetrics:
        """rollout/probe_gap: nats, the worst server's; rollout/sync_s; rollout/servers: in use."""
        return {**self._metrics, "rollout/servers": float(len(self._living()))}

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        key: tuple[int, ...],
        temperature: float | None = None,
    ) -> list[Rollout]:
        """As Sampler.sample. Raises RolloutError, RolloutUnavailable where no server is left."""
        if not prompts:
            return []
        if self.version is None:
            self.update_weights(0)
        temperature = self.config.temperature if temperature is None else temperature
        seeds = row_counters(key, prompts, 1).tolist()
        draws = [
            self._draw(self.renderer.student(prompt), samples, seed, temperature)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        groups = ask(lambda client: self._draw_all(client, draws))
        known = temperature == self.config.temperature
        return [
            self._rollout(prompt, sample, ids, logprobs if known else [math.nan] * len(ids))
            for prompt, group in zip(prompts, groups, strict=True)
            for sample, (ids, logprobs) in enumerate(group)
        ]

    def update_weights(self, version: int) -> None:
        """Gives every server the policy's present weights, unless they have this version already.

        Raises RolloutUnavailable where none takes them, RolloutError where what a server then
        answers is not what the policy computes.
        """
        if version == self.version:
            return
        start, self.version = time.perf_counter(), None
        try:
            weights = write_weights(self.policy, self.folder, version)
        except OSError as error:
            raise RolloutError(f"{self.folder}: no weights for the servers: {error}") from error
        probes = self._everywhere(lambda client, server: self._reload(client, server, weights))
        if not probes:
            raise self._unavailable("no vLLM server took the new weights")
        gaps = [self._checked_gap(server, *group) for server, [group] in probes]
        remove_others(weights)
        self.version = version
        seconds = time.perf_counter() - start
        self._metrics = {"rollout/probe_gap": max(gaps), "rollout/sync_s": seconds}

    def _draw(self, prompt_ids: tuple[int, ...], samples: int, seed: int, temperature: float):
        c = self.config
        # vLLM adds the sample's index to the seed, a signed 64-bit number.
        rest = (temperature, c.top_p, c.top_k, self.stop_ids, seed >> 2)
        return Draw(prompt_ids, samples, c.max_new_tokens, *rest)

    def _everywhere(self, use: Callable[..., Awaitable[T]]) -> list[tuple[VllmServer, T]]:
        """use(client, server) with every server at once; who answered. The others are lost."""

        async def attempt(client: httpx.AsyncClient, server: VllmServer):
            try:
                found = await use(client, server)
            except ServerLost as error:
                self._lose(server, error)
                return []
            server.lost = None
            return [(server, found)]

        answers = ask(lambda client: gather([attempt(client, server) for server in self.servers]))
        return [answer for answered in answers for answer in answered]

    async def _open(self, client: httpx.AsyncClient, server: VllmServer) -> None:
        longest = self.renderer.config.max_prompt_tokens + self.config.max_new_tokens
        limit = longest_sequence(self.policy.config)
        length = longest if limit is None else min(longest, limit)
        ids = self.renderer.encode_text(_PROBE_TEXT)
        await server.open(client, length, _PROBE_TEXT, ids)

    async def _reload(self, client: httpx.AsyncClient, server: VllmServer, weights: Path):
        if server.lost:
            await self._open(client, server)
        await server.load_weights(client, weights)
        return await server.complete(client, self._probe(), len(self.policy.head_VD))

    async def _draw_all(self, client: httpx.AsyncClient, draws: Sequence[Draw]) -> list:
        turns = {server.url: asyncio.Semaphore(GROUPS_PER_SERVER) for server in self.servers}

        async def group(index: int, draw: Draw):
            while living := self._living():
                server = living[index % len(living)]
                async with turns[server.url]:
                    if server.lost:
                        continue
                    try:
                        return await server.complete(client, draw, len(self.policy.head_VD))
                    except ServerLost as error:
                        self._lose(server, error)
            raise self._unavailable("no vLLM server is left")

        return await gather([group(index, draw) for index, draw in enumerate(draws)])

    def _living(self) -> list[VllmServer]:
        return [server for server in self.servers if not server.lost]

    def _lose(self, server: VllmServer, error: ServerLost) -> None:
        if not server.lost:
            log.warning("vLLM server %s is left out: %s", server.url, error)
        server.lost = str(error)

    def _unavailable(self, what: str) -> RolloutUnavailable:
        lost = "; ".join(f"{server.url}{server.lost}" for server in self.servers if server.lost)
        return RolloutUnavailable(f"{what}: {lost}. Start them; --resume auto continues the run")

    def _probe(self) -> Draw:
        c, ids = self.config, tuple(self.renderer.encode_text(_PROBE_TEXT))
        tokens = min(PROBE_TOKENS, c.max_new_tokens)
        # No stop token: an early one would leave little to compare.
        return Draw(ids, 1, tokens, c.temperature, c.top_p, c.top_k, frozenset(), seed=1)

    def _checked_gap(self, server: VllmServer, ids: list[int], logprobs: list[float]) -> float:
        """Mean |served - own log-prob| of the probe. Raises RolloutError above the tolerance."""
        temperature = self.config.temperature
        gap = self._gap(ids, logprobs, temperature)
        if gap <= PROBE_TOLERANCE:
            return gap
        found = (
            f"{server.url}: after an update of the weights the log-probs of a probe differ from "
            f"this run's model by {gap:.3f} per token, more than {PROBE_TOLERANCE}"
        )
        if temperature != 1.0 and self._gap(ids, logprobs, 1.0) <= PROBE_TOLERANCE:
            raise RolloutError(
                f"{found}: they are those of temperature 1, and rollout.temperature is "
                f"{temperature}; start it with --logprobs-mode processed_logprobs"
            )
        raise RolloutError(
            f"{found}: serve the model of model.name, unquantized and for this run alone, and "
            "without --logprobs-mode where rollout.top_k or top_p is set"
        )

    @torch.no_grad()
    def _gap(self, ids: list[int], logprobs: list[float], temperature: float) -> float:
        policy = self.policy
        tree = TokenTree(self._probe().prompt_ids, (Branch((), tuple(ids)),))
        statistics = fused_linear_statistics(
            policy.hidden([tree]),
            policy.head_VD,
            torch.tensor(ids, device=policy.device),
            temperature=temperature,
            **policy.head_options(),
        )
        own_T = statistics.student_logprob_T.cpu().double()
        return float((own_T - torch.tensor(logprobs, dtype=own_T.dtype)).abs().mean())


def open_sampler(policy, renderer: PromptRenderer, config: RolloutConfig, run_dir: Path) -> Sampler:
    """The sampler that rollout.engine names. vllm: its weights are passed on in run_dir/served."""
    if config.engine == "vllm":
        return VllmSampler(policy, renderer, config, run_dir / "served")
    return Sampler(policy, renderer, config)


def _refuse_settings(config: RolloutConfig) -> None:
    if not config.servers:
        raise RolloutError('rollout.servers: empty; with rollout.engine = "vllm" name a base URL')
    if config.temperature != 1.0 and (config.top_k or config.top_p < 1.0):
        raise RolloutError(
            f"rollout.temperature = {config.temperature} with rollout.top_k = {config.top_k} and "
            f"rollout.top_p = {config.top_p}: vLLM cannot return the log-probs that training needs "
            "then; set rollout.temperature = 1, or rollout.top_k = 0 and rollout.top_p = 1"
        )
