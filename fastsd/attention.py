"""One attention function for every phase, registered with transformers as "fastsd".

What a phase needs travels through the model's forward as a keyword argument:

    training            token_tree, a TreeAttention: many trees packed into one sequence
    prefill             nothing: torch's causal scaled_dot_product_attention
    decoding            branch_cache, a BranchCache: all branches of a question read one copy of
                        its keys and values, as one matrix product

Shapes: P prompts, B rows (branches), S branch slots per prompt, N query heads, K key/value heads,
R = N / K, H head dim, L prefix length, T branch positions, or tokens of a pack.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastsd.packing import Pack, PrefixKeys
from fastsd.refusals import refuse_layer
from fastsd_kernels import shared_prefix_attention

NAME = "fastsd"


def fastsd_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    branch_cache=None,
    token_tree=None,
    **kw,
):
    if branch_cache is not None:
        refuse_layer(branch_cache.span, dropout, kw)
        return branch_cache.attend(module.layer_idx, query, key, value, scaling), None
    if token_tree is not None:
        refuse_layer(token_tree.span, dropout, kw)
        return token_tree.attend(module.layer_idx, query, key, value, scaling), None
    refuse_layer(key.shape[2], dropout, kw)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kw
    )


def _no_mask(*args, **kwargs) -> None:
    """Rows are right-padded and causal, so pads are never seen: no mask is needed."""
    return None


AttentionInterface.register(NAME, fastsd_attention)
AttentionMaskInterface.register(NAME, _no_mask)


class TreeAttention:
    """The attention of one forward over packed token trees; every layer calls `attend`.

    layers: indices of the layers that did, so that a model whose layers do not all come here,
    which would mix the trees, is found.
    """

    def __init__(self, pack: Pack, reads: PrefixKeys | None, fills: PrefixKeys | None, device):
        """reads: of the pack's segments from outside. fills: gets the prefixes' keys and values."""
        self.segments = segments = pack.segments
        self.reads, self.outside_P = reads, pack.outside_P.to(device)
        self.fills, self.root_P = fills, pack.root_P.to(device)
        self.layers: set[int] = set()
        ends = zip(segments.offsets, segments.lengths, strict=True)
        self.span = max((offset + length for offset, length in ends), default=0)

    def attend(self, layer: int, query_1NTH, key_1KTH, value_1KTH, scaling) -> Tensor:
        """[1, T, N, H]"""
        self.layers.add(layer)
        query_TNH, key_TKH, value_TKH = (
            x[0].transpose(0, 1) for x in (query_1NTH, key_1KTH, value_1KTH)
        )
        if self.fills is not None and layer not in self.fills.layers:  # recomputed: filled before
            self.fills.layers[layer] = (
                key_TKH.detach().index_select(0, self.root_P),
                value_TKH.detach().index_select(0, self.root_P),
            )
        prefix_key_PKH = prefix_value_PKH = None
        if self.reads is not None:
            key, value = self.reads.layers[layer]
            prefix_key_PKH = key.index_select(0, self.outside_P)
            prefix_value_PKH = value.index_select(0, self.outside_P)
        return shared_prefix_attention(
            query_TNH,
            key_TKH,
            value_TKH,
            self.segments,
            prefix_key_PNH=prefix_key_PKH,
            prefix_value_PNH=prefix_value_PKH,
            scale=scaling,
        )[None]


class BranchCache:
    """Keys and values while decoding: one shared copy per prompt, a preallocated one per branch."""

    def __init__(self, prefix_layers, prefix_length_P: Tensor, samples: int, max_new_tokens: int):
        """prefix_layers: per layer (key, value) [P, K, L, H], right-padded to one length."""
        prompts = prefix_length_P.shape[0]
        key_PKLH = prefix_layers[0][0]
        # The CPU's batched bf16 products are slow and round the scores: keep the cache in fp32.
        self.dtype = torch.float32 if key_PKLH.device.type == "cpu" else key_PKLH.dtype
        device = key_PKLH.device
        self.key_PKHL = [key.to(self.dtype).mT.contiguous() for key, _ in prefix_layers]
        self.value_PKLH = [value.to(self.dtype).contiguous() for _, value in prefix_layers]
        column_L = torch.arange(key_PKLH.shape[2], device=device)
        self.pad_PL = column_L >= prefix_length_P[:, None]
        self.prompt_of_row = torch.arange(prompts, device=device).repeat_interleave(samples)
        self.slot_of_row = torch.arange(samples, device=device).repeat(prompts)
        self.slots = samples
        heads, head_dim = key_PKLH.shape[1], key_PKLH.shape[3]
        shape = (prompts * samples, heads, max_new_tokens, head_dim)
        self.key_BKTH = [torch.empty(shape, dtype=self.dtype, device=device) for _ in prefix_layers]
        self.value_BKTH = [torch.empty_like(key) for key in self.key_BKTH]
        self.length = 0

    @property
    def span(self) -> int:
        """Positions of the longest row, the new one included."""
        return self.pad_PL.shape[1] + self.length + 1

    @property
    def rows(self) -> int:
        return self.prompt_of_row.shape[0]

    def attend(self, layer: int, query_BN1H, key_BK1H, value_BK1H, scaling: float) -> Tensor:
        """One new position: stores its key and value, attends to the prefix and the own branch."""
        rows, heads, _, head_dim = query_BN1H.shape
        kv_heads = key_BK1H.shape[1]
        position = self.length
        self.key_BKTH[layer][:, :, position] = key_BK1H[:, :, 0]
        self.value_BKTH[layer][:, :, position] = value_BK1H[:, :, 0]
        query_BKRH = query_BN1H.reshape(rows, kv_heads, heads // kv_heads, head_dim)
        query_BKRH = query_BKRH.to(self.dtype) * scaling
        own_key = self.key_BKTH[layer][:, :, : position + 1]
        own_value = self.value_BKTH[layer][:, :, : position + 1]
        scores_BKRL = self._from_grid(self._to_grid(query_BKRH) @ self.key_PKHL[layer])
        pad_B11L = self.pad_PL[self.prompt_of_row][:, None, None]
        scores_BKRL = scores_BKRL.masked_fill(pad_B11L, float("-inf"))
        scores = torch.cat([scores_BKRL, query_BKRH @ own_key.mT], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(self.dtype)
        prefix_length = self.pad_PL.shape[1]
        prefix_part = self._to_grid(weights[..., :prefix_length]) @ self.value_PKLH[layer]
        out_BKRH = self._from_grid(prefix_part) + weights[..., prefix_length:] @ own_value
        return out_BKRH.reshape(rows, 1, heads, head_dim).to(query_BN1H.dtype)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows` (ascending indices), and prompts left without any."""
        kept = self.prompt_of_row[rows]
        prompts, self.prompt_of_row = torch.unique(kept, return_inverse=True)
        first_of_prompt = torch.searchsorted(
            self.prompt_of_row, torch.arange(len(prompts)).to(kept)
        )
        self.slot_of_row = torch.arange(len(rows)).to(kept) - first_of_prompt[self.prompt_of_row]
        self.slots = int(self.slot_of_row.max()) + 1
        self.key_BKTH = [key[rows] for key in self.key_BKTH]
        self.value_BKTH = [value[rows] for value in self.value_BKTH]
        if len(prompts) < self.pad_PL.shape[0]:
            self.pad_PL = self.pad_PL[prompts]
            self.key_PKHL = [key[prompts] for key in self.key_PKHL]
            self.value_PKLH = [value[prompts] for value in self.value_PKLH]

    def _to_grid(self, x_BKRX: Tensor) -> Tensor:
        """[B, K, R, X] -> [P, K, S*R, X]: rows of one prompt side by side; empty slots are 0."""
        prompts = self.pad_PL.shape[0]
        _, kv_heads, repeat, width = x_BKRX.shape
        if self.rows == prompts * self.slots:
            grid = x_BKRX.reshape(prompts, self.slots, kv_heads, repeat, width)
        else:
            grid = x_BKRX.new_zeros(prompts, self.slots, kv_heads, repeat, width)
            grid[self.prompt_of_row, self.slot_of_row] = x_BKRX
        return grid.transpose(1, 2).reshape(prompts, kv_heads, self.slots * repeat, width)

    def _from_grid(self, x_PKMX: Tensor) -> Tensor:
        prompts, kv_heads, merged, width = x_PKMX.shape
        grid = x_PKMX.reshape(prompts, kv_heads, self.slots, merged // self.slots, width)
        grid = grid.transpose(1, 2)
        if self.rows == prompts * self.slots:
            return grid.reshape(self.rows, kv_heads, merged // self.slots, width)
        return grid[self.prompt_of_row, self.slot_of_row]
