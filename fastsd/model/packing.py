"""Token trees to one packed sequence, without padding, and back.

The prefix of every tree is a root, its branches are the segments below it, and several questions
are several roots of one pack. A branch's segment holds its context and its response but for the
last token, which predicts nothing. The row that predicts a response's first token is the one
before it: the branch's own, or the prefix's last, which then serves several branches.

Where the leading tokens of a tree's prefix went through the same weights before, as the question of
a live teacher did for the student, their keys and values are read (`PrefixKeys`) and their segment
is one from outside the pack.

Shapes: T tokens of the pack, A response tokens of all branches in order, P tokens of prefixes,
K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastsd.errors import FastsdError
from fastsd.types import Branch, TokenTree, common_prefix
from fastsd_kernels import PrefixTree


@dataclass
class PrefixKeys:
    """Keys and values of some trees' prefixes, one after the other.

    Filled by one forward and good for others with the same weights. Trees are matched by their
    tokens, which with the weights determine a prefix's keys.

    prefixes: token ids. layers: by layer index key_PKH, value_PKH. graph: what fills them leaves
    its autograd graph on them; otherwise they are detached.
    """

    prefixes: list[tuple[int, ...]] = field(default_factory=list)
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    graph: bool = False

    def shared(self, tree: TokenTree) -> tuple[int, int]:
        """(first row, how many) of the tree's leading tokens; never its prefix's last, whose hidden
        state may be wanted."""
        best, start = (0, 0), 0
        for prefix in self.prefixes:
            common = len(common_prefix([prefix, tree.prefix_ids[:-1]]))
            best = max(best, (start, common), key=lambda found: found[1])
            start += len(prefix)
        return best

    def check_filled(self, layers: int) -> None:
        """Raises FastsdError unless a forward of a model of so many layers filled them."""
        rows = sum(map(len, self.prefixes))
        if len(self.layers) != layers or any(len(key) != rows for key, _ in self.layers.values()):
            found = f"{len(self.layers)} layers of {[len(k) for k, _ in self.layers.values()]} rows"
            raise FastsdError(
                f"reads: expected keys of {layers} layers of {rows} rows, the tokens of their "
                f"{len(self.prefixes)} prefixes, found {found}; fill them with a forward of the "
                "same model first"
            )

    def check_empty(self) -> None:
        """Raises FastsdError where a forward filled them already."""
        if self.prefixes or self.layers:
            raise FastsdError(
                f"fills: holds keys of {len(self.prefixes)} prefixes and {len(self.layers)} layers "
                "already; give empty ones"
            )

    def check_heads(self, layer: int, key_TKH: Tensor) -> None:
        """Raises FastsdError where the layer's keys are of other heads than those here."""
        here, there = tuple(self.layers[layer][0].shape[1:]), tuple(key_TKH.shape[1:])
        if here != there:
            raise FastsdError(
                f"reads: expected keys of [heads, head dim] = {list(there)} in layer {layer}, "
                f"found {list(here)}; fill them with a forward of the same model"
            )


@dataclass(frozen=True)
class Pack:
    """Trees as one sequence; all tensors on the CPU.

    ids_T: token ids. segments: who sees whom, and the positions. row_A: for every response token
    the row of the pack that predicts it. outside_P: the rows of PrefixKeys that the segments from
    outside are. prefix_P: the rows of the trees' prefixes, counted through those from outside and
    then the pack's.
    """

    ids_T: Tensor
    segments: PrefixTree
    row_A: Tensor
    outside_P: Tensor
    prefix_P: Tensor


def pack_trees(trees: Sequence[TokenTree], known: PrefixKeys | None = None) -> Pack:
    """Raises FastsdError for a response that nothing precedes, or that has no token."""
    shared = [known.shared(tree) for tree in trees] if known is not None else []
    ids: list[int] = []
    rows: list[int] = []
    prefixes: list[int] = []
    lengths = [count for _, count in shared]
    parents: list[int | None] = [None] * len(shared)
    outside = [row for start, count in shared for row in range(start, start + count)]
    read = 0
    for index, tree in enumerate(trees):
        count = lengths[index] if shared else 0
        prefix = tree.prefix_ids[count:]
        root, start = len(lengths), len(outside) + len(ids)
        prefixes += [*range(read, read + count), *range(start, start + len(prefix))]
        read += count
        ids += prefix
        lengths.append(len(prefix))
        parents.append(index if shared else None)
        last_of_prefix = len(ids) - 1
        for branch in tree.branches:
            _check_branch(tree, branch)
            fed = (*branch.context_ids, *branch.response_ids[:-1])
            first = len(ids) + len(branch.context_ids)
            rows.append(first - 1 if branch.context_ids else last_of_prefix)
            rows += range(first, first + len(branch.response_ids) - 1)
            ids += fed
            lengths.append(len(fed))
            parents.append(root)
    as_rows = (torch.tensor(x, dtype=torch.int64) for x in (ids, rows, outside, prefixes))
    ids_T, row_A, outside_P, prefix_P = as_rows
    return Pack(ids_T, PrefixTree(lengths, parents, len(shared)), row_A, outside_P, prefix_P)


def _check_branch(tree: TokenTree, branch: Branch) -> None:
    if not branch.response_ids:
        raise FastsdError("a response without tokens: nothing is predicted; leave the branch out")
    if not tree.prefix_ids and not branch.context_ids:
        raise FastsdError("a response without a prompt has nothing to predict it")


class TokenCount(NamedTuple):
    """Tokens through the network: with shared prefixes, and what full rows would add to them."""

    computed: int
    saved: int


def count_tokens(trees: Sequence[TokenTree], known: PrefixKeys | None = None) -> TokenCount:
    """What `pack_trees` of the same arguments computes and saves."""
    own = sum(len(b.context_ids) + len(b.response_ids) - 1 for t in trees for b in t.branches)
    prefixes = sum(len(tree.prefix_ids) for tree in trees)
    shared = sum(known.shared(tree)[1] for tree in trees) if known is not None else 0
    full = own + sum(len(tree.prefix_ids) * len(tree.branches) for tree in trees)
    computed = own + prefixes - shared
    return TokenCount(computed, full - computed)


def longest_path(trees: Sequence[TokenTree]) -> int:
    """Tokens of the longest full row: prefix, context and response."""
    return max(
        len(tree.prefix_ids)
        + max((len(b.context_ids) + len(b.response_ids) for b in tree.branches), default=0)
        for tree in trees
    )
