"""Runs a model on shapes alone and writes down every operation.

On torch's meta device tensors have shapes and no memory. A forward and a backward pass over them
shows each matrix product with its dimensions, the bytes that all other operations read and write,
how many there are, and what autograd keeps in between. So LoRA, frozen layers, gradient
checkpointing, grouped heads and mixtures of experts count as the code that trains them computes
them, and nothing is fitted.

Attention is not in these counts: it depends on the tree (`rows.py`). What it keeps is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsd.model.refusals import ModelError

# Rows of the trace: a prime that no dimension of a model is a multiple of.
_ROWS = 10007
_PRODUCTS = ("mm", "addmm", "_grouped_mm")
# Neither read nor write: they rename memory or reserve it.
_FREE = ("_unsafe_view", "empty_like", "new_empty", "empty", "empty_strided", "detach")


class Product(NamedTuple):
    """One matrix product: `outer` x `inner` weights against `rows` times the tokens.

    width: bytes of an element. sums_rows: the tokens are what is summed over (the weight's
    gradient). experts: weights of that shape, of which a token takes `rows`; 1 without a mixture.
    """

    outer: int
    inner: int
    rows: int
    width: int
    sums_rows: bool = False
    experts: int = 1

    @property
    def flop(self) -> int:
        """Operations a token, a multiplication and an addition being two."""
        return 2 * self.outer * self.inner * self.rows

    def bytes(self, tokens: float, passes: float) -> float:
        """Read and written over `passes` calls that have `tokens` tokens in all."""
        each = tokens / max(passes, 1e-9)
        used = self.experts * (1 - (1 - self.rows / self.experts) ** each)
        weights = self.outer * self.inner * (used if self.experts > 1 else 1)
        return self.width * (passes * weights + tokens * self.rows * (self.outer + self.inner))


@dataclass(frozen=True)
class Pass:
    """One direction through all layers. products: each with how often it runs.

    bytes_a_token, bytes_a_pass: of everything that is no matrix product. operations: calls.
    """

    products: tuple[tuple[Product, int], ...]
    bytes_a_token: float
    bytes_a_pass: float
    operations: int

    @property
    def flop(self) -> int:
        """Of a token's matrix products."""
        return sum(product.flop * times for product, times in self.products)


def trace(causal_lm: Any, model: torch.nn.Module) -> tuple[Pass, Pass, float]:
    """Forward, backward, and the bytes a token that autograd keeps in between."""
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    model.train(True)  # Hugging Face's layers checkpoint in training mode only
    ids_1T = torch.zeros(1, _ROWS, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, _ROWS, _ROWS, device="meta")
    kept = _Kept(model)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor)
    try:
        with hooks, _Count() as forward:
            hidden_1TD = decoder(
                input_ids=ids_1T,
                position_ids=ids_1T,
                attention_mask=mask,
                token_tree=_AnyTree(),
                use_cache=False,
            ).last_hidden_state
        with _Count() as backward:
            if hidden_1TD.requires_grad:
                hidden_1TD.backward(torch.empty_like(hidden_1TD))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{causal_lm.config.model_type}: cannot be counted: {reason}") from error
    return forward.result(), backward.result(), kept.bytes_a_token


def count_operations(run: Callable[[], object]) -> int:
    """How many operations on tensors a call makes; it runs."""
    with _Count() as count:
        run()
    return count.operations


class _AnyTree:
    """Stands in for `attention.TreeAttention`: keeps what it keeps, computes nothing."""

    span = 1

    def attend(self, layer: int, query_1NTH, key_1KTH, value_1KTH, scaling) -> Tensor:
        return _Attention.apply(query_1NTH, key_1KTH, value_1KTH)  # pyright: ignore


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_1NTH: Tensor, key_1KTH: Tensor, value_1KTH: Tensor) -> Tensor:
        heads, rows, head_dim = query_1NTH.shape[1:]
        out_1TNH = query_1NTH.new_empty(1, rows, heads, head_dim)
        lse_NT = query_1NTH.new_empty(heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query_1NTH, key_1KTH, value_1KTH, out_1TNH, lse_NT)
        return out_1TNH

    @staticmethod
    def backward(ctx, grad_1TNH: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _Kept:
    """Bytes of the distinct memory that autograd keeps; the weights are there anyway."""

    def __init__(self, model: torch.nn.Module):
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}
        self._storages: dict[int, Any] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._storages[storage._cdata] = storage  # held, so that its address stays its own
        return tensor

    @property
    def bytes_a_token(self) -> float:
        return sum(storage.nbytes() for storage in self._storages.values()) / _ROWS


class _Count(TorchDispatchMode):
    """Counts operations: matrix products by shape, all others by the bytes of their tensors."""

    def __init__(self):
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.bytes_of_rows = 0
        self.bytes_fixed = 0
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_grouped_mm":  # on shapes alone torch has it for bf16 only
            out = _grouped_result(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        if name in _FREE or func.is_view:
            return out
        self.operations += 1
        read, written = _tensors((args, kwargs)), _tensors(out)
        if name in _PRODUCTS:
            self.products[_product(read)] += 1
            return out
        if name == "embedding":  # reads the rows that it gives back, not the whole table
            read = written
        for tensor in (*read, *written):
            size = tensor.numel() * tensor.element_size()
            if tensor.numel() % _ROWS == 0:
                self.bytes_of_rows += size
            else:
                self.bytes_fixed += size
        return out

    def result(self) -> Pass:
        a_token = self.bytes_of_rows / _ROWS
        return Pass(tuple(self.products.items()), a_token, self.bytes_fixed, self.operations)


def _grouped_result(left: Tensor, right: Tensor, offs: Tensor, *_, **__) -> Tensor:
    """[m, k] x [experts, k, n] -> [m, n]; [m, k] x [k, n], rows summed by expert -> one each."""
    rows, columns = left.shape[-2], right.shape[-1]
    by_expert = left.ndim == right.ndim == 2
    shape = (offs.shape[0], rows, columns) if by_expert else (rows, columns)
    return left.new_empty(shape)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _product(read: Sequence[Tensor]) -> Product:
    """From the operands' shapes: [m, k] x [k, n], grouped [m, k] x [experts, k, n]."""
    left, right = [x for x in read if x.ndim >= 2][-2:]
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    experts, width = right.shape[0] if right.ndim == 3 else 1, left.element_size()
    if m % _ROWS == 0:
        return Product(n, k, m // _ROWS, width, experts=experts)
    if experts == 1 and right.ndim == 2 and len(read) > 2:  # a gradient of grouped weights
        experts = next((x.shape[0] for x in read if x.ndim == 1), 1)
    return Product(m, n, k // _ROWS, width, sums_rows=True, experts=experts)
