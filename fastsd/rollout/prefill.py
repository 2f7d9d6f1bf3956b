"""Prompts that begin alike, prefilled once: a critic's instruction, a system message, an example.

A prompt is cut into blocks at fixed positions, and a block is shared by the prompts that are equal
up to its end. Each block is a segment of the packed tree, also where nobody shares it: attention
then adds up a prompt's keys in an order that follows from the prompt alone, so that the C++ kernel
gives it the same bits whatever else is in the pack. The kernels that merge one call per level have
no such bits to keep, and every level costs them a pass: for them, blocks without a fork between
them are one segment.

Shapes: T tokens of the pack, P prompts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastsd.errors import FastsdError
from fastsd.model.packing import Pack
from fastsd_kernels import PrefixTree

# Small blocks share more of an instruction's end; each costs the attention a pass of its own.
BLOCK = 64


class PromptTree:
    """Prompts that are packed together. `tokens`: of the pack."""

    def __init__(self) -> None:
        self.tokens = 0
        self._blocks: list[tuple[int, ...]] = []
        self._parents: list[int] = []
        self._index: dict[tuple[int, tuple[int, ...]], int] = {}
        self._paths: list[list[int]] = []

    def missing(self, prompt: tuple[int, ...]) -> int:
        """How many tokens `add` of the prompt would add."""
        block = -1
        for start in range(0, len(prompt), BLOCK):
            block = self._index.get((block, prompt[start : start + BLOCK]), -2)
            if block == -2:
                return len(prompt) - start
        return 0

    def add(self, prompt: tuple[int, ...]) -> None:
        """Raises FastsdError for a prompt without tokens."""
        if not prompt:
            raise FastsdError("a prompt without tokens has nothing to predict a response from")
        path = [-1]
        for start in range(0, len(prompt), BLOCK):
            key = path[-1], prompt[start : start + BLOCK]
            if key not in self._index:
                self._index[key] = len(self._blocks)
                self._parents.append(key[0])
                self._blocks.append(key[1])
                self.tokens += len(key[1])
            path.append(self._index[key])
        self._paths.append(path[1:])

    def pack(self, joined: bool) -> tuple[Pack, list[Tensor]]:
        """The pack, whose row_A are the prompts' last tokens, and each prompt's rows in it.

        joined: one segment for blocks without a fork between them.
        """
        order = self._depth_first()
        ids = [token for block in order for token in self._blocks[block]]
        first_row, rows = {}, 0
        for block in order:
            first_row[block] = rows
            rows += len(self._blocks[block])
        rows_of_prompt = [
            torch.cat([torch.arange(len(self._blocks[b])) + first_row[b] for b in path])
            for path in self._paths
        ]
        pack = Pack(
            ids_T=torch.tensor(ids, dtype=torch.int64),
            segments=self._segments(order, joined),
            row_A=torch.stack([rows_P[-1] for rows_P in rows_of_prompt]),
            outside_P=torch.empty(0, dtype=torch.int64),
            prefix_P=torch.arange(len(ids)),
        )
        return pack, rows_of_prompt

    def _depth_first(self) -> list[int]:
        children = self._children()
        order, waiting = [], [b for b, parent in enumerate(self._parents) if parent < 0][::-1]
        while waiting:
            order.append(waiting.pop())
            waiting += reversed(children[order[-1]])
        return order

    def _children(self) -> list[list[int]]:
        children: list[list[int]] = [[] for _ in self._blocks]
        for block, parent in enumerate(self._parents):
            if parent >= 0:
                children[parent].append(block)
        return children

    def _segments(self, order: list[int], joined: bool) -> PrefixTree:
        children = self._children()
        lengths: list[int] = []
        parents: list[int | None] = []
        segment_of: dict[int, int] = {}
        for block in order:
            parent = self._parents[block]
            if joined and parent >= 0 and len(children[parent]) == 1:
                segment_of[block] = segment_of[parent]
                lengths[segment_of[block]] += len(self._blocks[block])
                continue
            segment_of[block] = len(lengths)
            lengths.append(len(self._blocks[block]))
            parents.append(None if parent < 0 else segment_of[parent])
        return PrefixTree(lengths, parents)


def prompt_trees(prompts: Iterable[tuple[int, ...]], most_tokens: int) -> list[PromptTree]:
    """The prompts in order, in as few trees as hold at most so many tokens or a single prompt."""
    trees: list[PromptTree] = []
    for prompt in prompts:
        if not trees or trees[-1].tokens + trees[-1].missing(prompt) > most_tokens:
            trees.append(PromptTree())
        trees[-1].add(prompt)
    return trees
