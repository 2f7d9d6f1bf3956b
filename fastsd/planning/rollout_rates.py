"""Rates of rollouts on this machine, each measured with the sampler's own parts.

Decoding reads every weight for a few rows, so the weights run in turn, head and all, as many as
exceed a cache. What a step costs beside its arithmetic shows in layers too narrow to have any; as
many bytes as a layer's weights are read after each, off the clock, for calls are slower where
weights have driven what they need out of the cache.

Shapes: B rows being decoded, H head dim, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsd.model import Policy, attention
from fastsd.model.packed_layers import packed_layers
from fastsd.planning.model import ModelCounts
from fastsd.planning.rows import Step
from fastsd.planning.timing import MOST_BYTES, MOST_FLOP, Rate, rate, spent, times
from fastsd.planning.trace import trace
from fastsd.rollout.decoding import Decoding, Rows
from fastsd_kernels import PrefixDecodeCache, native_library, sample_from_logits
from fastsd_kernels.packed_linear import PackedLinear

_MOST_TREE_ROWS = 2048
_DECODED = 24


class Streams:
    """The model's weights in decoding's form, or as many layers of it as MOST_BYTES hold."""

    def __init__(self, model: ModelCounts, dtype: torch.dtype):
        self._packs = native_library.missing() is None and dtype in native_library.DTYPES
        head = max(1, min(model.vocabulary, int(MOST_BYTES / 2 / model.hidden / model.width)))
        a_layer = [
            (product.outer, product.inner)
            for product, count in model.forward.products
            for _ in range(math.ceil(count / model.layers) if product.experts == 1 else 1)
        ]
        room = (MOST_BYTES - head * model.hidden * model.width) / model.width
        count = max(1, min(model.layers, int(room / sum(n * k for n, k in a_layer))))
        shapes = [*a_layer * count, (head, model.hidden)]
        self._weights = [torch.randn(n, k, dtype=dtype) for n, k in shapes]
        self._bytes = float(sum(weight.nbytes for weight in self._weights))
        self._numbers = self._bytes / model.width
        self._layers: list[Callable[[Tensor], Tensor]] = []
        self._pack()

    def read(self, rows: int) -> Rate:
        """Seconds a byte of weights in a decode step."""
        return rate(self._run(rows), self._bytes)

    def multiply(self, rows: int) -> Rate:
        """Seconds a FLOP of a prefill."""
        rows = max(1, min(rows, int(4 * MOST_FLOP / 2 / self._numbers)))
        return rate(self._run(rows), 2 * self._numbers * rows)

    def packing(self) -> Rate:
        """Seconds a byte of weights brought into that form, once for each batch of rollouts."""
        return rate(self._pack, self._bytes) if self._packs else Rate(0.0, 0.0)

    def _pack(self) -> None:
        self._layers.clear()
        for weight_NK in self._weights:
            self._layers.append(PackedLinear(weight_NK) if self._packs else _linear(weight_NK))

    def _run(self, rows: int) -> Callable[[], object]:
        inputs = [
            torch.randn(rows, weight.shape[1], dtype=weight.dtype) for weight in self._weights
        ]

        def run() -> None:
            for layer, x in zip(self._layers, inputs, strict=True):
                layer(x)

        return run


def _linear(weight_NK: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nn.functional.linear(x, weight_NK)


def decode_attention_rate(model: ModelCounts, step: Step, rows: int, dtype: torch.dtype) -> Rate:
    """Of a byte of keys and values in one layer, halfway through the responses of one question."""
    at = step.lengths
    rows, length = min(rows, at.samples), max(1, at.response // 2)
    question = min(at.question, _MOST_TREE_ROWS)
    length = min(length, _MOST_TREE_ROWS)
    shape = (model.kv_heads, model.head_dim)
    cache = PrefixDecodeCache(1, *shape, rows, length + 1, dtype, "cpu")
    prompt = torch.randn(2, model.kv_heads, question, model.head_dim, dtype=dtype)
    cache.admit(0, [(prompt[0], prompt[1])])
    query_BNH = torch.randn(rows, model.heads, model.head_dim, dtype=dtype)
    key_BKH, value_BKH = torch.randn(2, rows, *shape, dtype=dtype)
    slot_B, zero_B = np.arange(rows), np.zeros(rows, np.int64)

    def run() -> None:
        cache.begin(slot_B, zero_B, zero_B + length)
        cache.attend(0, query_BNH, key_BKH, value_BKH, model.head_dim**-0.5)

    return rate(run, 2 * key_BKH[0].nbytes * (question + rows * length))


class _Weights:
    """Stands in for weights that are read between calls. seconds: how long that took."""

    def __init__(self):
        self.seconds, self._at = 0.0, 0
        self._numbers = torch.ones(int(MOST_BYTES / 2) // 4)

    def read(self, count: float) -> None:
        """So many bytes, others each time."""
        numbers = min(int(count) // 4, len(self._numbers))
        if self._at + numbers > len(self._numbers):
            self._at = 0
        part = self._numbers[self._at : self._at + numbers]
        self._at += numbers
        self.seconds += spent(part.sum)


class _NoTokenizer:
    """All that a policy asks of a tokenizer here."""

    pad_token_id = eos_token_id = 0


def decode_rates(model: ModelCounts, rows: int, dtype: torch.dtype) -> tuple[Rate, Rate]:
    """(a step, a layer of a step) of the sampler with layers whose arithmetic takes no time and the
    model's own vocabulary to draw from. Layers of more operations than Llama's take more calls."""
    few, many = (_sampler_rate(model, rows, dtype, layers) for layers in (1, 5))
    layer = Rate(*(max(0.0, (b - a) / 4) for a, b in zip(few, many, strict=True)))
    step = Rate(*(max(0.0, a - b) for a, b in zip(few, layer, strict=True)))
    with torch.device("meta"):
        narrow = [_narrow(16, dtype, layers) for layers in (1, 5)]
    one, five = (trace(each, each)[0].operations for each in narrow)
    llama = (five - one) / 4
    mine = (model.forward.operations - (one - llama)) / model.layers
    return step, times(layer, max(1.0, mine / llama))


def _narrow(vocabulary: int, dtype: torch.dtype, layers: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=1,
        num_key_value_heads=1, vocab_size=vocabulary, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME
        )


def _sampler_rate(model: ModelCounts, rows: int, dtype: torch.dtype, layers: int) -> Rate:
    narrow = _narrow(model.vocabulary, dtype, layers)
    policy = Policy(narrow.requires_grad_(False).eval(), _NoTokenizer())
    weights = _Weights()
    a_layer = sum(p.outer * p.inner * p.rows * n for p, n in model.forward.products) / model.layers
    for layer in policy.decoder.layers:
        layer.register_forward_hook(lambda *_: weights.read(model.width * a_layer))

    @torch.no_grad()
    def run() -> None:
        def draw(hidden_BD: Tensor, drawn: Rows) -> tuple[np.ndarray, np.ndarray]:
            weights.read(model.width * model.head_weights)
            uniform_B = torch.full((len(hidden_BD),), 0.5, dtype=torch.float64)
            found = sample_from_logits(logits(hidden_BD), uniform_B, temperature=1.0)
            return found[0].numpy(), found[1].numpy()

        with packed_layers(policy) as logits:
            Decoding(policy, [(1,)], rows, rows, _DECODED, frozenset(), draw, fixed=False).run()

    return rate(run, _DECODED, lambda: weights.seconds)
