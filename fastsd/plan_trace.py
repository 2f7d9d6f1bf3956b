"""What one token costs in a model, counted by running the model on shapes alone.

The model is built from its configuration on torch's meta device, where tensors have shapes and no
memory, and goes forward and backward once. Every operation that runs is seen: matrix products with
their dimensions, the bytes that all others read and write, how many there are, and what autograd
keeps for the backward pass. So LoRA, frozen layers, gradient checkpointing, grouped heads and
mixtures of experts count as the code that trains them computes them, and nothing is fitted.

Attention is not in these counts: it depends on the tree (`plan_counts.py`). What it keeps is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsd import attention
from fastsd.model import _add_lora, _freeze, model_path
from fastsd.refusals import ModelError, longest_sequence, refuse_unsupported
from fastsd.sections import ModelConfig

# Rows of the trace: a prime that no dimension of a model is a multiple of.
_ROWS = 10007
_PRODUCTS = ("mm", "addmm", "_grouped_mm")
# Neither read nor write: they rename memory or reserve it.
_FREE = ("_unsafe_view", "empty_like", "new_empty", "empty", "empty_strided", "detach")


class Product(NamedTuple):
    """One matrix product: `outer` x `inner` weights against `rows` times the tokens.

    sums_rows: the tokens are what is summed over (the weight's gradient). experts: weights of that
    shape, of which each token takes `rows`; 1 without a mixture.
    """

    outer: int
    inner: int
    rows: int
    sums_rows: bool = False
    experts: int = 1

    @property
    def flop(self) -> int:
        """Operations a token, a multiplication and an addition being two."""
        return 2 * self.outer * self.inner * self.rows

    def bytes(self, tokens: float, passes: float, width: int) -> float:
        """Read and written over `passes` calls that have `tokens` tokens in all."""
        each = tokens / max(passes, 1e-9)
        used = self.experts * (1 - (1 - self.rows / self.experts) ** each)
        weights = self.outer * self.inner * (used if self.experts > 1 else 1)
        return width * (passes * weights + tokens * self.rows * (self.outer + self.inner))


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


@dataclass(frozen=True)
class ModelCounts:
    """A model in numbers.

    parameters, trainable: of all weights. root: of what is in no layer (embedding, norm, own head).
    largest_layer: of one layer. longest: positions that the model has. width: bytes of a compute
    element. kept: bytes a token that autograd keeps for the backward pass; kept_layer: of one layer
    without checkpointing, which is what a checkpointed layer needs while it runs again.
    """

    name: str
    parameters: int
    trainable: int
    root: int
    largest_layer: int
    head_trainable: bool
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    longest: int | None
    width: int
    checkpoints: bool
    forward: Pass
    backward: Pass
    kept: float
    kept_layer: float

    @property
    def head(self) -> Product:
        """Hidden states against the vocabulary."""
        return Product(self.vocabulary, self.hidden, 1)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one position in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.width


def count_model(config: ModelConfig, dtype: torch.dtype) -> ModelCounts:
    """Counts of the configured model, as it is trained; reads its configuration, no weights.

    Raises ModelError where there is no configuration to read or its layers are not supported.
    """
    hf_config = read_config(config.name)
    model = _build(hf_config, config, dtype)
    forward, backward, kept = _trace(model)
    kept_layer = kept / hf_config.num_hidden_layers
    if config.gradient_checkpointing:
        plain = _build(
            hf_config, config.model_copy(update={"gradient_checkpointing": False}), dtype
        )
        kept_layer = _trace(plain)[2] / hf_config.num_hidden_layers
    root, largest_layer = _parts(model)
    heads = hf_config.num_attention_heads
    head_VD = _causal_lm(model).get_output_embeddings().weight
    return ModelCounts(
        name=config.name,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        root=root,
        largest_layer=largest_layer,
        head_trainable=head_VD.requires_grad,
        layers=hf_config.num_hidden_layers,
        hidden=hf_config.hidden_size,
        vocabulary=head_VD.shape[0],
        heads=heads,
        kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        longest=longest_sequence(hf_config),
        width=dtype.itemsize,
        checkpoints=config.gradient_checkpointing,
        forward=forward,
        backward=backward,
        kept=kept,
        kept_layer=kept_layer,
    )


def read_config(name: str) -> Any:
    """The Hugging Face configuration of a model name or folder; raises ModelError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path(name))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.name = {name!r}: its configuration cannot be read: {reason}; give a folder that "
            "holds a config.json, or a Hugging Face name that this machine can reach"
        ) from error
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [field for field in needed if not isinstance(getattr(config, field, None), int)]
    if missing:
        raise ModelError(
            f"model.name = {name!r}: its configuration has no {', '.join(missing)}; a plan needs a "
            "decoder-only language model"
        )
    refuse_unsupported(config)
    return config


def _build(hf_config: Any, config: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
    """The model without memory, as `load_policy` makes it: adapters, frozen parts, checkpoints."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation=attention.NAME
            )
    except (ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model.name = {config.name!r}: no causal LM: {reason}") from error
    if config.lora is not None:
        model = _add_lora(model, config.lora)
    _freeze(model, config.freeze)
    if config.gradient_checkpointing:
        new_name = hasattr(model, "activation_checkpointing_enable")
        enable = "activation_checkpointing_enable" if new_name else "gradient_checkpointing_enable"
        getattr(model, enable)({"use_reentrant": False})
    return model


def _trace(model: torch.nn.Module) -> tuple[Pass, Pass, float]:
    """Forward, backward, and the bytes a token that autograd keeps in between."""
    causal_lm = _causal_lm(model)
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
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _product(read: Sequence[Tensor]) -> Product:
    """From the operands' shapes: [m, k] x [k, n], grouped [m, k] x [experts, k, n]."""
    left, right = [x for x in read if x.ndim >= 2][-2:]
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    experts = right.shape[0] if right.ndim == 3 else 1
    if m % _ROWS == 0:
        return Product(n, k, m // _ROWS, experts=experts)
    if experts == 1 and right.ndim == 2 and len(read) > 2:  # a gradient of grouped weights
        experts = next((x.shape[0] for x in read if x.ndim == 1), 1)
    return Product(m, n, k // _ROWS, sums_rows=True, experts=experts)


def _parts(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters outside the layers, and of the largest layer."""
    layers: Counter[str] = Counter()
    root = 0
    for name, parameter in model.named_parameters():
        found = re.search(r"\.layers\.(\d+)\.|\.h\.(\d+)\.", name)
        if found:
            layers[found[0]] += parameter.numel()
        else:
            root += parameter.numel()
    return root, max(layers.values(), default=0)


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
