"""One decode step: every row is fed a token and gets the hidden state that predicts its next.

On a CPU a step computes the rows under way and nothing else. On a GPU a step of few rows is bound
by its launches, so all slots are fed, each time in the same shapes, and the whole forward is one
CUDA graph; slots whose rows have finished go over their last position again, unread.

Shapes: B rows under way, S slots, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsd.model import Policy
from fastsd_kernels import PrefixDecodeCache


class Feed(NamedTuple):
    """What a step is given, int64; rows of one question are neighbours.

    length_B: tokens fed to the row before. position_B: of the fed token.
    """

    slot_B: np.ndarray
    question_B: np.ndarray
    length_B: np.ndarray
    token_B: np.ndarray
    position_B: np.ndarray


class RowsUnderWay:
    """Steps of as many rows as there are. A slot is free again when its row has ended."""

    def __init__(self, policy: Policy, cache: PrefixDecodeCache, slots: int):
        self.policy, self.cache = policy, cache
        self.free = list(range(slots))

    def take(self, count: int) -> np.ndarray:
        """So many free slots, for new questions."""
        taken, self.free = self.free[:count], self.free[count:]
        return np.array(taken, np.int64)

    def start(self, feed: Feed) -> None:
        """The slots taken belong to these rows now; the cache has their questions."""

    def end(self, slot_B: np.ndarray, questions: list[int]) -> None:
        """Rows that ended, and the questions whose last rows were among them."""
        self.free += slot_B.tolist()
        for question in questions:
            self.cache.drop(question)

    def __call__(self, feed: Feed) -> Tensor:
        """hidden_BD"""
        self.cache.begin(feed.slot_B, feed.question_B, feed.length_B)
        ids, positions = (torch.from_numpy(x)[None] for x in (feed.token_B, feed.position_B))
        device, span = self.policy.device, int(feed.position_B.max()) + 1
        return self.policy.decode(ids.to(device), positions.to(device), self.cache, span)


class AllSlots:
    """Steps of all slots, captured once in a CUDA graph; on a CPU the same, eagerly.

    A question's slots, which are neighbours, are free again when all of its rows have ended, and
    its keys stay until they are taken.
    """

    def __init__(self, policy: Policy, cache: PrefixDecodeCache, slots: int):
        self.policy, self.cache = policy, cache
        self.free = list(range(slots))
        self.state = Feed(np.arange(slots), np.full(slots, -1), *np.zeros((3, slots), np.int64))
        self.ids_1S = torch.zeros(1, slots, dtype=torch.int64, device=policy.device)
        self.position_1S = torch.zeros_like(self.ids_1S)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: tuple[int, ...] = ()  # the cache's capacity then
        self.hidden_SD = torch.empty(0)

    def take(self, count: int) -> np.ndarray:
        taken, self.free = np.array(self.free[:count], np.int64), self.free[count:]
        for question in np.unique(self.state.question_B[taken]):
            if question >= 0:
                self.cache.drop(int(question))
        return taken

    def start(self, feed: Feed) -> None:
        for every_S, values_B in zip(self.state[1:], feed[1:], strict=True):
            every_S[feed.slot_B] = values_B

    def end(self, slot_B: np.ndarray, questions: list[int]) -> None:
        for question in questions:
            self.free += np.flatnonzero(self.state.question_B == question).tolist()

    def __call__(self, feed: Feed) -> Tensor:
        self.start(feed)
        state = self.state
        self.cache.begin(state.slot_B, state.question_B, state.length_B)
        self.ids_1S.copy_(torch.from_numpy(state.token_B)[None])
        self.position_1S.copy_(torch.from_numpy(state.position_B)[None])
        hidden_SD = self._replayed() if self.policy.device.type == "cuda" else self._run()
        return hidden_SD.index_select(0, torch.from_numpy(feed.slot_B).to(hidden_SD.device))

    def _run(self) -> Tensor:
        span = int(self.state.position_B.max()) + 1
        return self.policy.decode(self.ids_1S, self.position_1S, self.cache, span)

    def _replayed(self) -> Tensor:
        if self.graph is None or self.captured != self.cache.capacity:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up outside the graph
                self._run()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph, self.captured = torch.cuda.CUDAGraph(), self.cache.capacity
            with torch.cuda.graph(self.graph):
                self.hidden_SD = self._run()
        self.graph.replay()
        return self.hidden_SD
