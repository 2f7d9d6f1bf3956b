"""What one token costs in a model, counted by running the model on shapes alone.

The model is built from its configuration on torch's meta device, where tensors have shapes and no
memory, and goes forward and backward once. Every operation that runs is seen: matrix products with
their dimensions, the bytes that all others read and write, how many there are, and what autograd
keeps for the backward pass. So LoRA, frozen layers, gradient checkpointing, grouped heads and
mixtures of experts count as the code that trains them computes them, and nothing is fitted.

Attention is not in these counts: it depends on the tree (`plan_counts.py`). What it keeps is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

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
    """A model in numbers. Parameters: all, trainable, of the embedding and an own head (`root`),
    of the largest layer. kept: bytes a token that autograd keeps; kept_layer: of one layer, which
    gradient checkpointing holds while it goes through that layer again.
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
    width: int  # bytes of a compute element
    forward: Pass
    forward_for_backward: Pass
    backward: Pass
    kept: float
    kept_layer: float

    @property
    def head(self) -> Product:
        """The product with the vocabulary."""
        return Product(self.hidden, self.vocabulary, 1)

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
    forward, backward, kept = _trace(model, hf_config, config.gradient_checkpointing)
    plain = forward if config.gradient_checkpointing is False else None
    kept_plain = kept if plain else _trace(model, hf_config, False, backward=False)[2]
    root, layers = _root_and_layers(model)
    heads, layer_count = hf_config.num_attention_heads, hf_config.num_hidden_layers
    head = _causal_lm(model).get_output_embeddings().weight
    sizes = [p.numel() for p in model.parameters()]
    return ModelCounts(
        name=config.name,
        parameters=sum(sizes),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        root=root,
        largest_layer=max(layers, default=0),
        head_trainable=head.requires_grad,
        layers=layer_count,
        hidden=hf_config.hidden_size,
        vocabulary=head.shape[0],
        heads=heads,
        kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        longest=getattr(hf_config, "max_position_embeddings", None),
        width=dtype.itemsize,
        forward=_trace(model, hf_config, False, backward=False, gradient=False)[0],
        forward_for_backward=forward,
        backward=backward,
        kept=kept,
        kept_layer=kept_plain / layer_count,
    )
