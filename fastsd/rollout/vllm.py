"""Prompts to responses: vLLM servers over HTTP, behind the in-process sampler's protocol.

Responses are on-policy only if the servers hold this run's weights. `update_weights` gives them to
all, by a folder that they can read (`sync`) or over NCCL (`weight_transfer`), has the prefix caches
emptied, and then compares a probe: the log-probs of a served response against the policy's own
forward. That catches servers of another model, stale weights, and log-probs of another kind; two
roundings of the same weights lie far below `PROBE_TOLERANCE`. A server belongs to one run at once.

With `rollout.max_staleness` = k the servers keep weights that are at most k updates old, which
saves their transfer. The policy term then weighs each token by its probability ratio to the
log-prob that it was sampled with (`loss.clip`), as it does in the later steps of one batch.
Evaluations always get the present weights.

Rollout.logprobs are log p at the sampling temperature before top-k and top-p. vLLM returns log p
of the raw logits or of what it samples from (--logprobs-mode), so a temperature beside 1 together
with top-k or top-p is refused, and a draw at another temperature than rollout.temperature (an
evaluation) has NaN for log-probs. Seeds are given, but servers do not round alike whatever the
batch: a resumed run continues with the same weights and prompts, not with the same responses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastsd.config.sections import RolloutConfig
from fastsd.model import Policy
from fastsd.model.refusals import longest_sequence
from fastsd.parallel.placement import OneProcess
from fastsd.prompts.render import PromptRenderer
from fastsd.rollout.sampler import Sampler, row_counters
from fastsd.runtime.world import ALONE, World
from fastsd.serving.draw import Draw
from fastsd.serving.fleet import Fleet
from fastsd.serving.nccl import Choice, WeightTransfer, choose_sync
from fastsd.serving.server import RolloutError, VllmServer
from fastsd.serving.weights import SharedFiles
from fastsd.types import Branch, Prompt, Rollout, StepMetrics, TokenTree
from fastsd_kernels import fused_linear_statistics

if TYPE_CHECKING:
    import httpx

# Mean |log-prob difference| per token of the probe, in nats. Measured on SmolLM2-135M: 0.02 to 0.05
# between a bf16 server and a bf16 or fp32 policy; 0.4 and more for a head that is off by a tenth.
PROBE_TOLERANCE = 0.1
PROBE_TOKENS = 64
_PROBE_TEXT = "What is 17 + 25? Say it in words: \u00e9, \u6f22\u5b57.\n"


class VllmSampler(Sampler):
    """Samples responses from vLLM servers that are given the policy's weights.

    folder: where the weights are written for them. world: the run's ranks; each draws from the same
    servers, and the first one hands over the weights, as `sync` does. Opening asks every server for
    its model, longest sequence and tokenizer. Raises RolloutError for settings or servers that this
    run cannot use, RolloutUnavailable for servers that do not answer.
    """

    def __init__(
        self,
        policy: Policy,
        renderer: PromptRenderer,
        config: RolloutConfig,
        folder: Path,
        world: World = ALONE,
    ):
        super().__init__(policy, renderer, config)
        _refuse_settings(config)
        self.world = world
        self.fleet = Fleet(config, world.size)
        # Asked while the weights are whole: many processes keep a part of them each.
        self._vocabulary = len(policy.head_VD)
        self.version: int | None = None
        self._metrics: StepMetrics = {}
        choice, *_ = world.together(self._open_fleet)
        self._why = f" ({choice.why})" if choice.why else ""
        self.sync: SharedFiles | WeightTransfer = (
            SharedFiles(policy, folder)
            if choice.kind == "files"
            else WeightTransfer(policy, config.timeout_s)
        )

    @property
    def name(self) -> str:
        count = len(self.fleet.servers)
        return f"vLLM, {count} server{'s' * (count > 1)}, weights by {self.sync.name}{self._why}"

    def metrics(self) -> StepMetrics:
        """rollout/staleness: updates that the weights which the servers hold are behind;
        rollout/probe_gap: nats, the worst server's, when they got them; rollout/sync_s: what
        that took for the next batch; rollout/servers: in use; rollout/retried_groups: in all."""
        used = {"servers": len(self.fleet.living), "retried_groups": self.fleet.retried}
        return {**self._metrics, **{f"rollout/{name}": float(n) for name, n in used.items()}}

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        key: tuple[int, ...],
        temperature: float | None = None,
    ) -> list[Rollout]:
        """As Sampler.sample. Raises RolloutError, RolloutUnavailable where no server is left. Of
        many ranks each draws its own, after all have called `update_weights`."""
        if not prompts:
            return []
        if self.version is None:
            assert self.world.size == 1, "one rank cannot collect the weights"
            self.update_weights(0)
        temperature = self.config.temperature if temperature is None else temperature
        seeds = row_counters(key, prompts, 1).tolist()
        draws = [
            self._draw(self.renderer.student(prompt), samples, seed, temperature)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        groups = self.fleet.draw(draws, self._vocabulary)
        known = temperature == self.config.temperature
        return [
            self._rollout(prompt, sample, ids, logprobs if known else [math.nan] * len(ids))
            for prompt, group in zip(prompts, groups, strict=True)
            for sample, (ids, logprobs) in enumerate(group)
        ]

    def update_weights(
        self, version: int, staleness: int = 0, placement: OneProcess | None = None
    ) -> None:
        """Gives every server the policy's present weights, unless all hold ones of at most
        `staleness` versions before. A server that was restarted, or came back, needs them.

        placement: of the weights over the ranks; with more than one rank, all call this. Raises
        RolloutUnavailable where no server takes them, RolloutError where what one then answers is
        not what the policy computes.
        """
        start, placement = time.perf_counter(), placement or OneProcess(self.policy)
        if not self.world.lead(lambda: self._serves(version, staleness)):
            give = self.sync.collect(placement)
            with placement.gathered():
                self.world.lead(lambda: self._give_weights(version, give))
        told = self.world.lead(lambda: (self.version, self.fleet.state(), self._metrics))
        self.version, state, self._metrics = told
        self.fleet.follow(state)
        assert self.version is not None
        behind, seconds = version - self.version, time.perf_counter() - start
        self._metrics |= {"rollout/staleness": float(behind), "rollout/sync_s": seconds}

    def _serves(self, version: int, staleness: int) -> bool:
        behind = math.inf if self.version is None else version - self.version
        return 0 <= behind <= staleness and self.fleet.is_current()

    def _give_weights(self, version: int, give: Callable[[Fleet, int], None]) -> None:
        self.version = None
        fleet = self.fleet
        probes = fleet.load(
            lambda: give(fleet, version), version, self._open, self._probe(), self._vocabulary
        )
        if not probes:
            raise fleet.unavailable("no vLLM server took the new weights")
        gaps = [self._checked_gap(server, *group) for server, [group] in probes]
        self.sync.settle()
        self.version = version
        self._metrics["rollout/probe_gap"] = max(gaps)

    def _open_fleet(self) -> Choice:
        """Asks whether the servers can be used; on the first rank also how they get weights."""
        fleet = self.fleet
        fleet.everywhere(self._open)
        choice = Choice("files")
        if self.world.leads and fleet.living:
            fleet.refuse_doubles()
            choice = choose_sync(self.config, self.policy.device, fleet)
        if any(server.lost for server in fleet.servers):
            raise fleet.unavailable("rollout.servers: not all answer as vLLM does")
        return choice

    def _draw(self, prompt_ids: tuple[int, ...], samples: int, seed: int, temperature: float):
        c = self.config
        # vLLM adds the sample's index to the seed, a signed 64-bit number.
        rest = (temperature, c.top_p, c.top_k, self.stop_ids, seed >> 2)
        return Draw(prompt_ids, samples, c.max_new_tokens, *rest)

    async def _open(self, client: httpx.AsyncClient, server: VllmServer) -> None:
        longest = self.renderer.config.max_prompt_tokens + self.config.max_new_tokens
        limit = longest_sequence(self.policy.config)
        length = longest if limit is None else min(longest, limit)
        ids = self.renderer.encode_text(_PROBE_TEXT)
        await server.open(client, length, _PROBE_TEXT, ids)

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


def _refuse_settings(config: RolloutConfig) -> None:
    if not config.servers:
        raise RolloutError('rollout.servers: empty; with rollout.engine = "vllm" name a base URL')
    if config.temperature != 1.0 and (config.top_k or config.top_p < 1.0):
        raise RolloutError(
            f"rollout.temperature = {config.temperature} with rollout.top_k = {config.top_k} and "
            f"rollout.top_p = {config.top_p}: vLLM cannot return the log-probs that training needs "
            "then; set rollout.temperature = 1, or rollout.top_k = 0 and rollout.top_p = 1"
        )
