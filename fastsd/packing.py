"""Token trees to one packed sequence, without padding, and back.

The prefix of every tree is a root, its branches are the segments below it, and several questions
are several roots of one pack. A branch's segment holds its context and its response but for the
last token, which predicts nothing. The row that predicts a response's first token is the one
before it: the branch's own, or the prefix's last, which then serves several branches.

Shapes: T tokens of the pack, A response tokens of all branches in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsd.types import FastsdError, TokenTree
from fastsd_kernels import PrefixTree


@dataclass(frozen=True)
class Pack:
    """ids_T: token ids. segments: who sees whom, and the positions. row_A: for every response
    token the row of the pack that predicts it. All tensors on the CPU."""

    ids_T: Tensor
    segments: PrefixTree
    row_A: Tensor


def pack_trees(trees: Sequence[TokenTree]) -> Pack:
    """Raises FastsdError for a response whose first token nothing precedes."""
    ids: list[int] = []
    rows: list[int] = []
    lengths: list[int] = []
    parents: list[int | None] = []
    for tree in trees:
        root = len(lengths)
        ids += tree.prefix_ids
        lengths.append(len(tree.prefix_ids))
        parents.append(None)
        last_of_prefix = len(ids) - 1
        for branch in tree.branches:
            if not tree.prefix_ids and not branch.context_ids:
                raise FastsdError("a response without a prompt has nothing to predict it")
            fed = (*branch.context_ids, *branch.response_ids[:-1])
            first = len(ids) + len(branch.context_ids)
            rows.append(first - 1 if branch.context_ids else last_of_prefix)
            rows += range(first, first + len(branch.response_ids) - 1)
            ids += fed
            lengths.append(len(fed))
            parents.append(root)
    return Pack(torch.tensor(ids), PrefixTree(lengths, parents), torch.tensor(rows))


def longest_path(trees: Sequence[TokenTree]) -> int:
    """Tokens of the longest full row: prefix, context and response."""
    return max(
        len(tree.prefix_ids) + max(len(b.context_ids) + len(b.response_ids) for b in tree.branches)
        for tree in trees
    )
