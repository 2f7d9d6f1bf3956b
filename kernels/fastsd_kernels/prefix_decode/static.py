"""Decode attention in plain torch operations of fixed shapes, on any device.

Memory is preallocated and updated in place, lengths are masks and rows are moved by index tensors,
so nothing in `attend` waits for the device and a CUDA graph can hold it. Shapes depend only on the
number of rows and on `capacity`, which grows when a longer prefix, one more prefix, or more rows of
one prefix than ever come. Both parts compute on all of their memory: the prefixes on a grid of
(prefix, row of it), each prefix read once, the branches on all slots; what is vacant is computed
and not read.

    out = (e^(m_p - m) o_p + e^(m_o - m) o_o) / (e^(m_p - m) z_p + e^(m_o - m) z_o)
    m the largest score, z = sum of e^(score - m), o = sum of e^(score - m) v of a part

Shapes: B rows, N query heads, K key/value heads, R = N / K, H head dim; P prefixes, G rows of one
prefix, L positions of a prefix; S branch slots, T positions of a branch; X grid cells (P, or S);
M query vectors of a cell and head; J layers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .contract import CacheShape, Layers

_LOWEST = -1e30  # stands for the largest of no scores: e^(_LOWEST - m) is 0 for every other m


class StaticDecode:
    """The `Decoder` that a CUDA graph can hold; fp16 and fp64 too."""

    def __init__(self, shape: CacheShape, device: torch.device):
        self.shape, self.device = shape, device
        own = (shape.layers, shape.slots, shape.kv_heads, shape.max_new_tokens, shape.head_dim)
        self.key_JSKTH = torch.zeros(own, dtype=shape.dtype, device=device)
        self.value_JSKTH = torch.zeros_like(self.key_JSKTH)
        self.position_T = torch.arange(shape.max_new_tokens, device=device)
        self.length_S = torch.zeros(shape.slots, dtype=torch.int64, device=device)
        self.unseen_ST = self.position_T > self.length_S[:, None]
        # Of the rows of a step: the first B elements.
        self.slot_of_row, self.cell_of_row, self.length_of_row = (
            torch.zeros_like(self.length_S) for _ in range(3)
        )
        self.index_of: dict[int, int] = {}  # prefix name -> where it is in P
        self.rows_of_prefix = 1
        self._allocate_prefixes(0, 0)

    @property
    def capacity(self) -> tuple[int, int, int]:
        """Prefixes, positions of a prefix, rows of a prefix."""
        return self.key_JPKLH.shape[1], self.key_JPKLH.shape[3], self.rows_of_prefix

    def _allocate_prefixes(self, prefixes: int, positions: int) -> None:
        shape = self.shape
        size = (shape.layers, prefixes, shape.kv_heads, positions, shape.head_dim)
        self.key_JPKLH = torch.zeros(size, dtype=shape.dtype, device=self.device)
        self.value_JPKLH = torch.zeros_like(self.key_JPKLH)
        self.unseen_PL = torch.ones(prefixes, positions, dtype=torch.bool, device=self.device)

    def admit(self, prefix: int, layers: Layers) -> None:
        """Copies a prompt's keys and values into the first vacant place of P.

        layers: J pairs of [K, L, H], of the cache's dtype, any device. Allocates where there is no
        vacant place or L is more than any prefix had; `capacity` says so.
        """
        length = layers[0][0].shape[1]
        free = sorted(set(range(self.key_JPKLH.shape[1])) - set(self.index_of.values()))
        self._grow(len(self.index_of) + 1, length)
        index = self.index_of[prefix] = free[0] if free else len(self.index_of)
        for memory_JPKLH, which in ((self.key_JPKLH, 0), (self.value_JPKLH, 1)):
            # What was there may be infinite, and 0 times that is not 0.
            memory_JPKLH[:, index, :, length:] = 0
            for layer, parts in enumerate(layers):
                memory_JPKLH[layer, index, :, :length] = parts[which]
        self.unseen_PL[index] = torch.arange(self.unseen_PL.shape[1], device=self.device) >= length

    def _grow(self, prefixes: int, positions: int) -> None:
        before = self.key_JPKLH, self.value_JPKLH, self.unseen_PL
        had_prefixes, had_positions = before[2].shape
        if prefixes <= had_prefixes and positions <= had_positions:
            return
        if prefixes > had_prefixes:
            prefixes = max(prefixes, 2 * had_prefixes)
        # Whole steps of 64 positions: a slightly longer prefix allocates nothing.
        positions = max(had_positions, -(-positions // 64) * 64)
        self._allocate_prefixes(max(prefixes, had_prefixes), positions)
        self.key_JPKLH[:, :had_prefixes, :, :had_positions] = before[0]
        self.value_JPKLH[:, :had_prefixes, :, :had_positions] = before[1]
        self.unseen_PL[:had_prefixes, :had_positions] = before[2]

    def drop(self, prefix: int) -> None:
        """Its place in P is vacant from now on; what is there is overwritten, not cleared."""
        del self.index_of[prefix]

    def begin(self, slot_B: np.ndarray, prefix_B: np.ndarray, length_B: np.ndarray) -> None:
        """Writes a step's index tensors and masks, in place.

        slot_B, prefix_B, length_B: [B] int64 each, as in `PrefixDecodeCache.begin`. Row b goes to
        branch slot_B[b] of S, and to cell (its prefix's place in P, its rank among that prefix's
        rows) of the grid [P, G]; G grows with the most rows that a prefix has had.
        """
        first_B = np.r_[True, prefix_B[1:] != prefix_B[:-1]]
        row_B = np.arange(len(prefix_B))
        place_B = row_B - np.maximum.accumulate(np.where(first_B, row_B, 0))
        self.rows_of_prefix = max(self.rows_of_prefix, int(place_B.max()) + 1)
        index_B = np.array([self.index_of[prefix] for prefix in prefix_B.tolist()])
        cell_B = index_B * self.rows_of_prefix + place_B
        rows = len(slot_B)
        self.slot_of_row[:rows] = torch.from_numpy(slot_B)
        self.cell_of_row[:rows] = torch.from_numpy(cell_B)
        self.length_of_row[:rows] = torch.from_numpy(length_B)
        self.length_S.index_copy_(0, self.slot_of_row[:rows], self.length_of_row[:rows])
        torch.gt(self.position_T, self.length_S[:, None], out=self.unseen_ST)
        fresh = slot_B[length_B == 0]
        if len(fresh):  # as in admit
            self.value_JSKTH[:, torch.from_numpy(fresh).to(self.device)] = 0

    def attend(
        self, layer: int, query_BNH: Tensor, key_BKH: Tensor, value_BKH: Tensor, scale: float
    ) -> Tensor:
        """Attention of the new positions, without waiting for the device.

        query_BNH: [B, N, H], N a multiple of K; key_BKH, value_BKH: [B, K, H], stored at
        length_B of their branches first. All of the cache's dtype, any strides.
        scale: factor of the scores.

        Returns: [B, N, H] in the query's dtype; scores and sums are in fp32 or better.
        """
        rows, heads, head_dim = query_BNH.shape
        slot_B, cell_B = self.slot_of_row[:rows], self.cell_of_row[:rows]
        key_SKTH, value_SKTH = self.key_JSKTH[layer], self.value_JSKTH[layer]
        key_SKTH[slot_B, :, self.length_of_row[:rows]] = key_BKH
        value_SKTH[slot_B, :, self.length_of_row[:rows]] = value_BKH
        query_BKRH = query_BNH.reshape(rows, self.shape.kv_heads, -1, head_dim)
        prefixes, _, per_prefix = self.capacity

        query_SKRH = query_BKRH.new_zeros(self.shape.slots, *query_BKRH.shape[1:])
        query_SKRH.index_copy_(0, slot_B, query_BKRH)
        own = _part(query_SKRH, key_SKTH, value_SKTH, self.unseen_ST, scale)
        own_BKRX = [x.index_select(0, slot_B) for x in own]

        grid = query_BKRH.new_zeros(prefixes * per_prefix, *query_BKRH.shape[1:])
        grid = grid.index_copy_(0, cell_B, query_BKRH).unflatten(0, (prefixes, per_prefix))
        query_PKMH = grid.transpose(1, 2).flatten(2, 3)
        prefix = _part(
            query_PKMH, self.key_JPKLH[layer], self.value_JPKLH[layer], self.unseen_PL, scale
        )
        prefix_BKRX = [
            x.unflatten(2, (per_prefix, -1)).transpose(1, 2).flatten(0, 1).index_select(0, cell_B)
            for x in prefix
        ]
        return _merged(own_BKRX, prefix_BKRX).reshape(rows, heads, head_dim).to(query_BNH.dtype)


def _part(query_XKMH, key_XKLH, value_XKLH, unseen_XL, scale: float) -> list[Tensor]:
    """[X, K, M, H] sum of e^(score - m) v, and [X, K, M, 1] the m and the sum of e^(score - m)."""
    scores_XKML = _product(query_XKMH, key_XKLH.mT) * scale
    scores_XKML = scores_XKML.masked_fill(unseen_XL[:, None, None], float("-inf"))
    if key_XKLH.shape[2] == 0:  # no prefix is longer
        most_XKM1 = scores_XKML.new_full((*scores_XKML.shape[:3], 1), _LOWEST)
    else:
        most_XKM1 = scores_XKML.amax(-1, keepdim=True).clamp_min(_LOWEST)
    weights_XKML = torch.exp(scores_XKML - most_XKM1)
    out_XKMH = _product(weights_XKML.to(value_XKLH.dtype), value_XKLH)
    return [out_XKMH, most_XKM1, weights_XKML.sum(-1, keepdim=True)]


def _merged(a: list[Tensor], b: list[Tensor]) -> Tensor:
    most = torch.maximum(a[1], b[1])
    left, right = torch.exp(a[1] - most), torch.exp(b[1] - most)
    return (left * a[0] + right * b[0]) / (left * a[2] + right * b[2])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in fp32 or better: bf16 scores would be 2^-9 of themselves off."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == wide:
        return left @ right
    if left.is_cuda:  # 16-bit operands, fp32 sums and result
        flat = left.flatten(0, 1), right.flatten(0, 1)
        return torch.bmm(*flat, out_dtype=wide).unflatten(0, left.shape[:2])
    return left.to(wide) @ right.to(wide)
