"""Runs that are compared train on the same tokens: the first draws, the others are given them.

Two ways of computing differ by rounding, and where a draw hangs on that, one token turns and the
runs part. So the first run of a name notes every token, by the version of the weights and the
number in [0, 1) that it was drawn with, which belongs to one position of one response alone. Later
runs draw as ever and compute every log-prob themselves; a token that turned is replaced, and must
have been at the edge: a number within EDGE of the run's own draws it. From the whole vocabulary
only: with top_k or top_p, rounding also moves tokens in and out of what is drawn from.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastsd.rollout import sampler
from fastsd_kernels import sample_from_logits

# Sums of probabilities in runs that may differ by 1e-4 (test_sharded_run.py), ten times over.
EDGE = 1e-3


class Draws:
    """The tokens of one run, noted or given. Nothing else may sample meanwhile."""

    def __init__(self, tokens: dict[int, dict[float, int]] | None = None):
        self.noting = tokens is None
        self.tokens = defaultdict(dict) if tokens is None else tokens
        self.version = 0
        self.turned = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        update = sampler.Sampler.update_weights

        def noted(engine, version, *args, **kwargs):
            self.version = version
            return update(engine, version, *args, **kwargs)

        sampler.Sampler.update_weights, sampler.sample_from_logits = noted, self.draw
        try:
            yield
        finally:
            sampler.Sampler.update_weights = update
            sampler.sample_from_logits = sample_from_logits

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, **options) -> tuple[Tensor, Tensor]:
        """In the place of sample_from_logits."""
        assert options["top_k"] == 0 and options["top_p"] == 1.0
        token_B, logprob_B = sample_from_logits(logits_BV, uniform_B, **options)
        tokens, numbers = self.tokens[self.version], uniform_B.tolist()
        if self.noting:
            tokens.update(zip(numbers, token_B.tolist(), strict=True))
            return token_B, logprob_B
        given_B = torch.tensor([tokens[number] for number in numbers])
        turned_B = given_B != token_B
        if turned_B.any():
            # The logits were overwritten with those that were drawn from.
            given = given_B[turned_B], logits_BV[turned_B], uniform_B[turned_B]
            logprob_B[turned_B] = self._turned(*given)
        return given_B, logprob_B

    def _turned(self, given_B: Tensor, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """The log-probs of tokens that were not drawn."""
        self.turned += len(given_B)
        logprob_BV = logits_BV.double().log_softmax(-1)
        logprob_B = logprob_BV.gather(-1, given_B[:, None])[:, 0]
        end_B = logprob_BV.exp().cumsum(-1).gather(-1, given_B[:, None])[:, 0]
        begin_B = end_B - logprob_B.exp()
        near_B = (begin_B - EDGE < uniform_B) & (uniform_B < end_B + EDGE)
        assert near_B.all(), "a token that rounding does not explain"
        return logprob_B.float()


@contextlib.contextmanager
def same_draws(file: Path, first: bool) -> Iterator[None]:
    """Inside, a run is given the draws in `file`; where there are none and it is the first, they
    are written."""
    draws = Draws(pickle.loads(file.read_bytes()) if file.exists() else None)
    with draws.installed():
        yield
    if draws.noting and first:
        file.write_bytes(pickle.dumps(dict(draws.tokens)))
