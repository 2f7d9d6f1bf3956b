"""One attention function for every phase, registered with transformers as "fastsd".

What a phase needs travels through the model's forward as a keyword argument:

    training, prefill   token_tree, a TreeAttention: many trees packed into one sequence
    decoding            decode_step, a DecodeStep: one new token of every row, and the rows of a
                        question read one copy of its keys and values

Shapes: B rows under way, N query heads, K key/value heads, H head dim, T tokens of a pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastsd.model.packing import Pack, PrefixKeys
from fastsd.model.refusals import refuse_layer
from fastsd_kernels import PrefixDecodeCache, shared_prefix_attention

NAME = "fastsd"


def fastsd_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    decode_step=None,
    token_tree=None,
    **kw,
):
    """transformers' attention interface: (output [1, T, N, H], None).

    query [1, N, T, H], key and value [1, K, T, H] with K dividing N (grouped queries), rotated.
    In a forward of fastsd's either token_tree, over T packed tokens, or decode_step, over T rows
    that each get one token, says who sees whom; else it is transformers' own causal attention.
    Raises ModelError for what the layer asks beyond that (dropout, windows, softcaps, sinks).
    """
    phase = decode_step if decode_step is not None else token_tree
    if phase is not None:
        refuse_layer(phase.span, dropout, kw)
        return phase.attend(module.layer_idx, query, key, value, scaling), None
    refuse_layer(key.shape[2], dropout, kw)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kw
    )


def _no_mask(*args, **kwargs) -> None:
    """Who sees whom is in the token tree or the decode step: no mask is needed."""
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
        self.fills, self.prefix_P = fills, pack.prefix_P.to(device)
        self.layers: set[int] = set()
        ends = zip(segments.offsets, segments.lengths, strict=True)
        self.span = max((offset + length for offset, length in ends), default=0)

    def attend(self, layer: int, query_1NTH, key_1KTH, value_1KTH, scaling) -> Tensor:
        """[1, T, N, H]"""
        self.layers.add(layer)
        query_TNH, key_TKH, value_TKH = (
            x[0].transpose(0, 1) for x in (query_1NTH, key_1KTH, value_1KTH)
        )
        prefix_key_PKH = prefix_value_PKH = None
        if self.reads is not None:
            self.reads.check_heads(layer, key_TKH)
            prefix_key_PKH, prefix_value_PKH = (
                x.index_select(0, self.outside_P).to(key_TKH.dtype)
                for x in self.reads.layers[layer]
            )
        if self.fills is not None:
            # A checkpointed layer that runs again must do the same again, but what it stored then
            # would keep its activations.
            key = self._prefix_rows(prefix_key_PKH, key_TKH)
            value = self._prefix_rows(prefix_value_PKH, value_TKH)
            self.fills.layers.setdefault(layer, (key, value))
        return shared_prefix_attention(
            query_TNH,
            key_TKH,
            value_TKH,
            self.segments,
            prefix_key_PNH=prefix_key_PKH,
            prefix_value_PNH=prefix_value_PKH,
            scale=scaling,
        )[None]

    def _prefix_rows(self, outside_PKH: Tensor | None, own_TKH: Tensor) -> Tensor:
        """The rows of the trees' prefixes, read or computed."""
        assert self.fills is not None
        rows = own_TKH if outside_PKH is None else torch.cat([outside_PKH, own_TKH])
        rows = rows if self.fills.graph else rows.detach()
        return rows.index_select(0, self.prefix_P)


@dataclass(frozen=True)
class DecodeStep:
    """The attention of one decode step: `cache.begin` has named its rows.

    span: positions of the longest row, the new one included.
    """

    cache: PrefixDecodeCache
    span: int

    def attend(self, layer: int, query_1NBH, key_1KBH, value_1KBH, scaling) -> Tensor:
        """[1, B, N, H]"""
        query_BNH, key_BKH, value_BKH = (
            x[0].transpose(0, 1) for x in (query_1NBH, key_1KBH, value_1KBH)
        )
        return self.cache.attend(layer, query_BNH, key_BKH, value_BKH, scaling)[None]
