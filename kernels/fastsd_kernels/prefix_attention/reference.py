"""The definition: softmax attention under the tree's dense mask, in fp32 or better, plain autograd.

    out_t = sum_s P_ts v_s,   P_t = softmax over the s that t sees of scale * q_t . k_s
    t sees s:  s's segment is above t's,  or it is t's own and s is not later than t

Shapes: T tokens of the pack, P of the prefixes from outside, L = P + T, N query heads, K key/value
heads, R = N / K, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tree import PrefixTree


def attention(
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKH: Tensor,
    prefix_key_PKH: Tensor | None,
    prefix_value_PKH: Tensor | None,
    tree: PrefixTree,
    scale: float,
) -> Tensor:
    """[T, N, H] in the query's dtype; differentiable as often as one likes."""
    if prefix_key_PKH is not None and prefix_value_PKH is not None:
        key_TKH = torch.cat([prefix_key_PKH, key_TKH])
        value_TKH = torch.cat([prefix_value_PKH, value_TKH])
    tokens, heads, head_dim = query_TNH.shape
    wide = torch.promote_types(query_TNH.dtype, torch.float32)
    kv_heads = key_TKH.shape[1]
    query_TKRH = query_TNH.to(wide).reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores_KRTL = torch.einsum("tkrh,lkh->krtl", query_TKRH, key_TKH.to(wide)) * scale
    seen_TL = dense_mask(tree).to(query_TNH.device)
    weights_KRTL = scores_KRTL.masked_fill(~seen_TL, float("-inf")).softmax(-1)
    out_TKRH = torch.einsum("krtl,lkh->tkrh", weights_KRTL, value_TKH.to(wide))
    return out_TKRH.reshape(tokens, heads, head_dim).to(query_TNH.dtype)


def dense_mask(tree: PrefixTree) -> Tensor:
    """seen_TL: [T, P + T] bool on the CPU, whether the row's token sees the column's."""
    row_T = tree.segment_of_T.tolist()
    column_L = [s for s in range(tree.outside) for _ in range(tree.lengths[s])] + row_T
    seen_TL = torch.zeros(len(row_T), len(column_L), dtype=torch.bool, device="cpu")
    segment_L = torch.tensor(column_L, dtype=torch.int64, device="cpu")
    token_L = torch.arange(len(column_L), device="cpu") - tree.prefix_tokens
    for token, own in enumerate(row_T):
        seen_TL[token] = (segment_L == own) & (token_L <= token)
        above = tree.parents[own]
        while above is not None:
            seen_TL[token] |= segment_L == above
            above = tree.parents[above]
    return seen_TL
