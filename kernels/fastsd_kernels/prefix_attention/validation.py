"""What the tensors of a call must be; every error names the tensor and what was found.

Shapes: T tokens of the pack, P of the prefixes from outside, N query heads, K key/value heads,
H head dim.
"""

from __future__ import annotations

import math

from torch import Tensor

from .tree import PrefixTree


def check_tree(tree: PrefixTree) -> None:
    if not isinstance(tree, PrefixTree):
        raise TypeError(
            f"tree: expected a PrefixTree, got {type(tree).__name__}; build one with "
            "PrefixTree(lengths, parents)"
        )


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores as a float."""
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    return float(scale)


def check_tensors(
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKH: Tensor,
    prefix_key_PKH: Tensor | None,
    prefix_value_PKH: Tensor | None,
) -> None:
    """Types, dtypes, devices and shapes against each other; reads no element."""
    given = {
        "query_TNH": query_TNH,
        "key_TNH": key_TKH,
        "value_TNH": value_TKH,
        "prefix_key_PNH": prefix_key_PKH,
        "prefix_value_PNH": prefix_value_PKH,
    }
    if (prefix_key_PKH is None) != (prefix_value_PKH is None):
        missing = "prefix_key_PNH" if prefix_key_PKH is None else "prefix_value_PNH"
        raise ValueError(f"{missing}: missing; prefix keys and prefix values go together")
    for name, tensor in given.items():
        if tensor is not None or not name.startswith("prefix"):
            _check_tensor(name, tensor, query_TNH)
    heads, kv_heads = query_TNH.shape[1], key_TKH.shape[1]
    if heads % kv_heads:
        raise ValueError(
            f"key_TNH: expected a number of heads that divides the query's {heads}, got {kv_heads}"
        )
    for name, tensor in given.items():
        if tensor is None or name == "query_TNH":
            continue
        rows = prefix_key_PKH if name.startswith("prefix") else query_TNH
        assert rows is not None
        shape = (rows.shape[0], kv_heads, query_TNH.shape[2])
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def _check_tensor(name: str, tensor: Tensor | None, query_TNH: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 3 or 0 in tensor.shape[1:]:
        raise ValueError(
            f"{name}: expected [tokens, heads, head dim], packed, without a batch dimension; got "
            f"shape {tuple(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating point numbers, got {tensor.dtype}")
    if tensor.dtype != query_TNH.dtype:
        raise TypeError(
            f"{name}: expected {query_TNH.dtype} like query_TNH, got {tensor.dtype}; cast one of "
            "them or run under torch.autocast"
        )
    if tensor.device != query_TNH.device:
        raise ValueError(
            f"{name}: expected device {query_TNH.device} like query_TNH, got {tensor.device}"
        )


def check_rows(query_TNH: Tensor, prefix_key_PKH: Tensor | None, tree: PrefixTree) -> None:
    """The tensors' rows are the tree's tokens."""
    if query_TNH.shape[0] != tree.tokens:
        raise ValueError(
            f"query_TNH: expected {tree.tokens} rows, the tokens of the tree, got "
            f"{query_TNH.shape[0]}"
        )
    if prefix_key_PKH is None and tree.outside:
        raise ValueError(
            f"prefix_key_PNH: missing; {tree.outside} segments of the tree come from outside, give "
            f"their {tree.prefix_tokens} rows of keys and values"
        )
    if prefix_key_PKH is not None and not tree.outside:
        raise ValueError(
            "prefix_key_PNH: given, but no segment of the tree comes from outside; build it with "
            "PrefixTree(lengths, parents, outside=1), the prefix as the first segment"
        )
    if prefix_key_PKH is not None and prefix_key_PKH.shape[0] != tree.prefix_tokens:
        raise ValueError(
            f"prefix_key_PNH: expected {tree.prefix_tokens} rows, the tokens of the tree's "
            f"{tree.outside} segments from outside, got {prefix_key_PKH.shape[0]}"
        )
