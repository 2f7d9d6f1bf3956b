"""Rates of this machine, each measured for some tens of milliseconds with the code that will run.

The clock is the process's, so that other programs disturb little. A rate is a range: from the
fastest round to the median one.

Shapes: B rows being decoded, T tokens, N heads, K key/value heads, H head dim, D hidden, V
vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsd import attention
from fastsd.cpu_linear import _product as onednn_product
from fastsd.cpu_linear import takes_onednn
from fastsd.decoding import Decoding, Rows
from fastsd.model import Policy
from fastsd.packed_layers import packed_layers
from fastsd.plan_model import ModelCounts
from fastsd.plan_rows import Step
from fastsd.plan_trace import Product, count_operations
from fastsd_kernels import (
    PrefixDecodeCache,
    PrefixTree,
    fused_linear_loss,
    native_library,
    sample_from_logits,
    shared_prefix_attention,
)
from fastsd_kernels.packed_linear import PackedLinear

# Larger ones are measured on fewer rows or columns.
_MOST_FLOP = 4e9
_MOST_BYTES = 200e6
_MOST_TREE_ROWS = 2048
_HEAD_ROWS, _HEAD_ENTRIES = 256, 8192
_DECODED = 24
_ROUNDS = 5
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Rate(NamedTuple):
    """Seconds of a unit of work: in the fastest round and in the median one."""

    low: float
    high: float


def product_rate(product: Product, tokens: int) -> Rate:
    dtype = _DTYPES[product.width]
    rows = max(16, min(tokens * product.rows, int(_MOST_FLOP / product.flop * product.rows)))
    outer, inner = product.outer, product.inner
    if outer * inner * 2 * rows > _MOST_FLOP:
        outer = max(16, int(_MOST_FLOP / (2 * inner * rows)))
    if product.sums_rows:
        left, right = (
            torch.randn(rows, outer, dtype=dtype).T,
            torch.randn(rows, inner, dtype=dtype).T,
        )
    else:
        left, right = (torch.randn(n, inner, dtype=dtype) for n in (rows, outer))
    run = _multiply(left, right)
    return _rate(run, 2 * outer * inner * rows)


def _multiply(left: Tensor, right: Tensor) -> Callable[[], object]:
    """left x right^T, as the linear layers run it."""
    if takes_onednn(left):
        return lambda: onednn_product(left, right)
    return lambda: torch.mm(left, right.T)


def _packed(n: int, k: int, dtype: torch.dtype) -> Callable[[Tensor], object]:
    weight_NK = torch.randn(n, k, dtype=dtype)
    if native_library.missing() is None and dtype in native_library.DTYPES:
        return PackedLinear(weight_NK)
    return lambda x: torch.nn.functional.linear(x, weight_NK)


def packed_rate(model: ModelCounts, rows: int, dtype: torch.dtype) -> Rate:
    product = max((p for p, _ in model.forward.products), key=lambda p: p.flop)
    rows = max(1, min(rows, int(_MOST_FLOP / (2 * product.outer * product.inner))))
    layer = _packed(product.outer, product.inner, dtype)
    x = torch.randn(rows, product.inner, dtype=dtype)
    return _rate(lambda: layer(x), 2 * product.outer * product.inner * rows)


def stream_rate(model: ModelCounts, rows: int, dtype: torch.dtype) -> Rate:
    """Of a chain of layers as large as the model's, so that they lie in cache only if it does."""
    product = max((p for p, _ in model.forward.products), key=lambda p: p.flop)
    each = product.outer * product.inner * model.width
    active = model.width * sum(p.flop * n for p, n in model.forward.products) / 2
    count = max(1, round(min(active, _MOST_BYTES) / each))
    layers = [_packed(product.outer, product.inner, dtype) for _ in range(count)]
    x = torch.randn(rows, product.inner, dtype=dtype)
    return _rate(lambda: [layer(x) for layer in layers], count * each)


def head_rate(model: ModelCounts, rows: int, teacher: str, dtype: torch.dtype) -> Rate:
    """Of the loss with its gradient, reverse KL or policy gradient, over part of the vocabulary."""
    rows = min(rows, _HEAD_ROWS)
    most = int(_MOST_FLOP / (2 * rows * model.hidden))
    vocabulary = min(model.vocabulary, max(most, _HEAD_ENTRIES))
    hidden = [torch.randn(rows, model.hidden, dtype=dtype, requires_grad=i == 0) for i in range(2)]
    head_VD = torch.randn(vocabulary, model.hidden, dtype=dtype) / model.hidden**0.5
    head_VD.requires_grad_(model.head_trainable)
    target_T, weight_T = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 1 / rows)
    taught = teacher != "none"
    options: dict = {"policy_weight_T": weight_T}
    if taught:
        options = {"teacher_TD": hidden[1], "divergence": "reverse_kl"}
        options["divergence_weight_T"] = weight_T
    products = 2 + taught + model.head_trainable
    flop = 2 * products * rows * model.hidden * vocabulary
    return _rate(lambda: fused_linear_loss(hidden[0], head_VD, target_T, **options), flop)


def packing_rate(model: ModelCounts, dtype: torch.dtype) -> Rate:
    """Of bringing a weight into the form that decoding reads, once for each batch of rollouts."""
    product = max((p for p, _ in model.forward.products), key=lambda p: p.flop)
    rows = max(1, min(product.outer, int(_MOST_BYTES / 8 / product.inner / model.width)))
    layer = _packed(rows, product.inner, dtype)
    if not isinstance(layer, PackedLinear):
        return Rate(0.0, 0.0)
    return _rate(layer.repack, rows * product.inner * model.width)


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

    return _rate(run, 2 * key_BKH[0].nbytes * (question + rows * length))


def attention_rates(model: ModelCounts, step: Step, dtype: torch.dtype) -> tuple[Rate, Rate]:
    """Of one layer over one group's tree, shortened where it is long."""
    at = step.lengths
    fed, samples = max(1, at.response - 1), at.samples
    shrink = min(1.0, _MOST_TREE_ROWS / (at.question + samples * fed))
    question, fed = max(1, int(at.question * shrink)), max(1, int(fed * shrink))
    tree = PrefixTree([question, *[fed] * samples], [None, *[0] * samples])
    rows = question + samples * fed
    query_TNH = torch.randn(rows, model.heads, model.head_dim, dtype=dtype, requires_grad=True)
    key_TKH, value_TKH = (
        torch.randn(rows, model.kv_heads, model.head_dim, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    a_pair = 4 * model.heads * model.head_dim
    flop = a_pair * (question * (question + 1) / 2 + samples * fed * (question + (fed + 1) / 2))

    def forward() -> Tensor:
        return shared_prefix_attention(query_TNH, key_TKH, value_TKH, tree)

    out_TNH = forward()
    upstream_TNH = torch.randn_like(out_TNH)
    inputs = (query_TNH, key_TKH, value_TKH)

    def backward() -> object:
        return torch.autograd.grad(out_TNH, inputs, upstream_TNH, retain_graph=True)

    return _rate(forward, flop), _rate(backward, 2.5 * flop)


def swept_rate(model: ModelCounts) -> Rate:
    """Of sums in place of fp32 tensors as large as the optimizer's, 50 MB at most."""
    count = int(min(4 * model.trainable, _MOST_BYTES / 4) / 4)
    left, right = torch.rand(2, count)
    return _rate(lambda: left.add_(right), 3 * left.nbytes)


def moved_rate(model: ModelCounts, rows: int, dtype: torch.dtype) -> Rate:
    """Of elementwise products of hidden states, several tensors in turn as a layer has them."""
    rows = max(1, min(rows, int(_MOST_BYTES / 4 / (8 * model.hidden * model.width))))
    tensors = [torch.randn(rows, model.hidden, dtype=dtype) for _ in range(8)]
    moved = 8 * 3 * tensors[0].nbytes

    def run() -> None:
        for left, right in zip(tensors, [*tensors[1:], tensors[0]], strict=True):
            torch.mul(left, right)

    return _rate(run, moved)


def operation_rate() -> Rate:
    """Of a decoder so narrow that its operations take no time but their calls."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=1,
        num_key_value_heads=1, vocab_size=16, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaModel(config).eval()
    ids_1T = torch.zeros(1, 4, dtype=torch.int64)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids_1T, use_cache=False)

    return _rate(run, count_operations(run))


class _NoTokenizer:
    """All that a policy asks of a tokenizer here."""

    pad_token_id = eos_token_id = 0


def decode_rates(model: ModelCounts, rows: int, dtype: torch.dtype) -> tuple[Rate, Rate]:
    """(a step, a layer of a step) of the sampler with layers whose arithmetic takes no time and the
    model's own vocabulary to draw from."""
    few, many = (_sampler_rate(model, rows, dtype, layers) for layers in (1, 5))
    layer = Rate(*(max(0.0, (b - a) / 4) for a, b in zip(few, many, strict=True)))
    return Rate(*(max(0.0, a - b) for a, b in zip(few, layer, strict=True))), layer


def _sampler_rate(model: ModelCounts, rows: int, dtype: torch.dtype, layers: int) -> Rate:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=1,
        num_key_value_heads=1, vocab_size=model.vocabulary, tie_word_embeddings=True,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        narrow = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME
        )
    policy = Policy(narrow.requires_grad_(False).eval(), _NoTokenizer())

    @torch.no_grad()
    def run() -> None:
        def draw(hidden_BD: Tensor, drawn: Rows) -> tuple[np.ndarray, np.ndarray]:
            uniform_B = torch.full((len(hidden_BD),), 0.5, dtype=torch.float64)
            found = sample_from_logits(logits(hidden_BD), uniform_B, temperature=1.0)
            return found[0].numpy(), found[1].numpy()

        with packed_layers(policy) as logits:
            Decoding(policy, [(1,)], rows, rows, _DECODED, frozenset(), draw, fixed=False).run()

    return _rate(run, _DECODED)


def _rate(run: Callable[[], object], units: float, seconds: float = 0.06) -> Rate:
    """Seconds a unit over some rounds, fewer of slow ones, after one that is not counted."""
    start = time.process_time()
    run()
    first = max(time.process_time() - start, 1e-6)
    calls, rounds = max(1, round(seconds / _ROUNDS / first)), _ROUNDS if first < seconds / 2 else 2
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            run()
        found.append((time.process_time() - start) / calls / units)
    return Rate(min(found), statistics.median(found))


def times(rate: Rate, units: float) -> Rate:
    return Rate(rate.low * units, rate.high * units)


def total(rates: Sequence[Rate]) -> Rate:
    return Rate(sum(rate.low for rate in rates), sum(rate.high for rate in rates))
