"""Many questions' responses, decoded side by side: shared prefixes and continuous batching.

A question is prefilled once, packed with others (what they begin with in common once for all,
`prefill.PromptTree`), and its rows read that one copy of keys and values. A row leaves the batch
with its last token; whole questions are admitted to the rows that became free, so the batch stays
full whatever the lengths. What a row is computed from never depends on its neighbours.

Shapes: B rows under way, D hidden, V vocabulary, Q questions, S samples per question, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsd.model import Policy
from fastsd.model.packing import PrefixKeys
from fastsd.rollout.decode_steps import AllSlots, Feed, RowsUnderWay
from fastsd.rollout.prefill import PromptTree, prompt_trees

# A prefill costs a pass over all weights: questions are admitted once this share of rows is free.
_ADMIT_AT = 0.25
# Prompt tokens through the network at once, whatever is admitted together.
_PREFILL_TOKENS = 16384


class Rows(NamedTuple):
    """Responses under way, ordered by question; int64.

    count_B: tokens drawn so far. token_B: the last of them, not yet fed.
    """

    question_B: np.ndarray
    sample_B: np.ndarray
    slot_B: np.ndarray
    count_B: np.ndarray
    token_B: np.ndarray

    def only(self, keep_B: np.ndarray) -> Rows:
        return Rows(*(values[keep_B] for values in self))

    def with_later(self, later: Rows) -> Rows:
        return Rows(*map(np.concatenate, zip(self, later, strict=True)))


class Responses:
    """What was drawn, by question and sample; token_QST[q, s, : count_QS[q, s]] is a response."""

    def __init__(self, questions: int, samples: int, max_new_tokens: int):
        shape = (questions, samples, max_new_tokens)
        self.token_QST = np.empty(shape, np.int32)
        self.logprob_QST = np.empty(shape, np.float32)
        self.count_QS = np.zeros(shape[:2], np.int64)

    def put(self, rows: Rows, token_B: np.ndarray, logprob_B: np.ndarray) -> None:
        where = rows.question_B, rows.sample_B
        self.token_QST[*where, rows.count_B] = token_B
        self.logprob_QST[*where, rows.count_B] = logprob_B
        self.count_QS[where] = rows.count_B + 1

    def of(self, question: int, sample: int) -> tuple[list[int], list[float]]:
        """Token ids and log-probs of one response."""
        where = question, sample, slice(self.count_QS[question, sample])
        return self.token_QST[where].tolist(), self.logprob_QST[where].tolist()


class Decoding:
    """Draws `samples` responses to each question. One object, one `run`.

    draw: (hidden_BD, rows) -> (token_B, logprob_B), the next token of each row. slots: responses
    decoded at once. fixed: a step feeds all slots (decode_steps.AllSlots), and a question's are
    taken anew only when all of its responses have ended.
    """

    def __init__(
        self,
        policy: Policy,
        prompt_ids: Sequence[tuple[int, ...]],
        samples: int,
        slots: int,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        draw: Callable[[Tensor, Rows], tuple[np.ndarray, np.ndarray]],
        fixed: bool,
    ):
        self.policy, self.prompt_ids, self.samples = policy, prompt_ids, samples
        self.max_new_tokens, self.draw = max_new_tokens, draw
        self.stop_ids = np.array(sorted(stop_ids), np.int64)
        self.prompt_Q = np.array([len(ids) for ids in prompt_ids], np.int64)
        slots = min(max(slots, samples), samples * len(prompt_ids))
        self.slots = slots - slots % samples if fixed else slots
        self.alive_Q = np.zeros(len(prompt_ids), np.int64)
        self.admitted = 0
        self.responses = Responses(len(prompt_ids), samples, max_new_tokens)
        self.cache = policy.decode_cache(self.slots, max_new_tokens)
        self.steps = (AllSlots if fixed else RowsUnderWay)(policy, self.cache, self.slots)

    def run(self) -> Responses:
        rows = Rows(*(np.empty(0, np.int64) for _ in Rows._fields))
        while rows.slot_B.size or self.admitted < len(self.prompt_ids):
            if self._room():
                rows = rows.with_later(self._admit())
            if rows.slot_B.size:
                rows = self._extend(rows, self.steps(self._feed(rows)))
        return self.responses

    def _room(self) -> bool:
        """Are questions waiting, and rows enough free to be worth a prefill?"""
        waiting = self.admitted < len(self.prompt_ids)
        free, enough = len(self.steps.free), max(self.samples, _ADMIT_AT * self.slots)
        return waiting and (free == self.slots or free >= enough)

    def _admit(self) -> Rows:
        """Prefills as many questions as there are rows for, and draws their first tokens."""
        first, samples = self.admitted, self.samples
        count = min(len(self.steps.free) // samples, len(self.prompt_ids) - first)
        self.admitted += count
        slot_B = self.steps.take(count * samples)
        hidden_PD = self._prefill(range(first, self.admitted))
        self.alive_Q[first : self.admitted] = samples
        rows = Rows(
            question_B=np.arange(first, self.admitted).repeat(samples),
            sample_B=np.tile(np.arange(samples), count),
            slot_B=slot_B,
            count_B=np.zeros_like(slot_B),
            token_B=np.zeros_like(slot_B),
        )
        self.steps.start(self._feed(rows._replace(count_B=np.ones_like(slot_B))))
        return self._extend(rows, hidden_PD.repeat_interleave(samples, 0))

    def _prefill(self, questions: range) -> Tensor:
        """hidden_PD of the prompts' last tokens; the cache gets their keys and values."""
        trees = prompt_trees((self.prompt_ids[q] for q in questions), _PREFILL_TOKENS)
        waiting = iter(questions)
        return torch.cat([self._prefill_together(tree, waiting) for tree in trees])

    def _prefill_together(self, tree: PromptTree, questions: Iterator[int]) -> Tensor:
        """Takes the questions of the tree's prompts."""
        pack, rows_of_prompt = tree.pack(joined=self.policy.attention_name != "native")
        keys = PrefixKeys()
        hidden_PD = self.policy.run(pack, fills=keys)
        for rows_P in rows_of_prompt:
            rows_P = rows_P.to(self.policy.device)
            layers = [
                [x.index_select(0, rows_P).transpose(0, 1) for x in keys.layers[n]]
                for n in keys.layers
            ]
            self.cache.admit(next(questions), [(key, value) for key, value in layers])
        return hidden_PD

    def _feed(self, rows: Rows) -> Feed:
        """Every row's last token."""
        fed_B = rows.count_B - 1
        position_B = self.prompt_Q[rows.question_B] + fed_B
        return Feed(rows.slot_B, rows.question_B, fed_B, rows.token_B, position_B)

    def _extend(self, rows: Rows, hidden_BD: Tensor) -> Rows:
        """Draws a token for every row; returns the rows that go on."""
        token_B, logprob_B = self.draw(hidden_BD, rows)
        self.responses.put(rows, token_B, logprob_B)
        count_B = rows.count_B + 1
        rows = rows._replace(count_B=count_B, token_B=token_B)
        done_B = np.isin(token_B, self.stop_ids) | (count_B == self.max_new_tokens)
        self._release(rows.only(done_B))
        return rows.only(~done_B)

    def _release(self, done: Rows) -> None:
        np.subtract.at(self.alive_Q, done.question_B, 1)
        questions = np.unique(done.question_B)
        self.steps.end(done.slot_B, questions[self.alive_Q[questions] == 0].tolist())
