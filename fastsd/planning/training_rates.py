"""Rates of training on this machine, each measured with the code that will run.

Nothing is measured hot that a step finds cold: products run in the order of a layer, over as many
layers' own weights and gradients as exceed a cache, and attention over several layers' heads.

Shapes: T tokens, N heads, K key/value heads, H head dim, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from fastsd.model.cpu_linear import onednn_product, takes_onednn
from fastsd.planning.counts import ADAMW_BYTES, Use, Work
from fastsd.planning.model import ModelCounts
from fastsd.planning.rows import Step
from fastsd.planning.timing import MOST_BYTES, MOST_FLOP, Rate, rate, span, spent
from fastsd.planning.trace import Product, count_operations
from fastsd_kernels import PrefixTree, fused_linear_loss, shared_prefix_attention

_CHAIN_FLOP = 2e10
_MOST_TREE_ROWS = 2048
_HEAD_ROWS, _HEAD_ENTRIES = 256, 8192
_ROUNDS = 3
_SETS = 8
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def product_rates(model: ModelCounts, work: Work) -> dict[Product, Rate]:
    """Of a FLOP of each product of a phase, measured in a pass through some layers."""
    a_layer = [use for use in work.products for _ in range(math.ceil(use.times / model.layers))]
    if not a_layer:
        return {}
    size = sum(_size(use.product) for use in a_layer)
    flop = sum(min(use.product.flop * _tokens(use), MOST_FLOP) for use in a_layer)
    count = int(min(model.layers, MOST_BYTES // size, _CHAIN_FLOP // flop))
    chain = [(use.product, *_call(use)) for use in a_layer * max(1, count)]
    rounds = [_pass(chain) for _ in range(_ROUNDS + 1)][1:]
    return {product: span([found[product] for found in rounds]) for product in rounds[0]}


def _pass(chain: list[tuple[Product, Callable[[], object], float]]) -> dict[Product, float]:
    """Seconds a FLOP of each product when all run once, in order."""
    seconds, flop = defaultdict[Product, float](float), defaultdict[Product, float](float)
    for product, run, units in chain:
        seconds[product] += spent(run)
        flop[product] += units
    return {product: seconds[product] / flop[product] for product in flop}


def _size(product: Product) -> int:
    return product.outer * product.inner * product.width


def _tokens(use: Use) -> int:
    """Of one call."""
    return max(1, round(use.tokens / max(use.passes, 1)))


def _call(use: Use) -> tuple[Callable[[], object], float]:
    """One product with a weight, or a weight's gradient, of its own; and its FLOP."""
    product, tokens = use.product, _tokens(use)
    dtype = _DTYPES[product.width]
    rows = max(16, min(tokens * product.rows, int(MOST_FLOP / product.flop * product.rows)))
    outer, inner = product.outer, product.inner
    if 2 * outer * inner * rows > MOST_FLOP:
        outer = max(16, int(MOST_FLOP / (2 * inner * rows)))
    if product.sums_rows:
        left, right = (torch.randn(rows, n, dtype=dtype).T for n in (outer, inner))
    else:
        left, right = (torch.randn(n, inner, dtype=dtype) for n in (rows, outer))
    kept: list[Tensor | None] = [None]

    def run() -> None:
        kept[0] = None
        kept[0] = onednn_product(left, right) if takes_onednn(left) else torch.mm(left, right.T)
        if not product.sums_rows:  # the next layer's takes its place
            kept[0] = None

    return run, 2.0 * outer * inner * rows


def head_rate(model: ModelCounts, rows: int, teacher: str, dtype: torch.dtype) -> Rate:
    """Of the loss with its gradient, reverse KL or policy gradient, over part of the vocabulary."""
    rows = min(rows, _HEAD_ROWS)
    most = int(MOST_FLOP / (2 * rows * model.hidden))
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
    return rate(lambda: fused_linear_loss(hidden[0], head_VD, target_T, **options), flop)


def attention_rates(model: ModelCounts, step: Step, dtype: torch.dtype) -> tuple[Rate, Rate]:
    """Of a FLOP forward and backward over one group's tree, shortened where it is long."""
    at = step.lengths
    fed, samples = max(1, at.response - 1), at.samples
    shrink = min(1.0, _MOST_TREE_ROWS / (at.question + samples * fed))
    question, fed = max(1, int(at.question * shrink)), max(1, int(fed * shrink))
    tree = PrefixTree([question, *[fed] * samples], [None, *[0] * samples])
    rows = question + samples * fed
    heads = (model.heads, model.kv_heads, model.kv_heads)

    def layer() -> list[Tensor]:
        return [
            torch.randn(rows, n, model.head_dim, dtype=dtype, requires_grad=True) for n in heads
        ]

    layers = [layer() for _ in range(_SETS)]
    a_pair = 4 * model.heads * model.head_dim
    flop = a_pair * (question * (question + 1) / 2 + samples * fed * (question + (fed + 1) / 2))

    def forward() -> list[Tensor]:
        return [shared_prefix_attention(q, k, v, tree) for q, k, v in layers]

    outs = forward()
    upstream_TNH = torch.randn_like(outs[0])

    def backward() -> list[object]:
        return [
            torch.autograd.grad(out_TNH, inputs, upstream_TNH, retain_graph=True)
            for out_TNH, inputs in zip(outs, layers, strict=True)
        ]

    return rate(forward, _SETS * flop), rate(backward, _SETS * 2.5 * flop)


def swept_rate(model: ModelCounts) -> Rate:
    """Of the optimizer's own passes over fp32 tensors as large as its, 50 MB at most."""
    count = max(1, int(min(4 * model.trainable, MOST_BYTES / 4) / 4))
    weight = torch.nn.Parameter(torch.rand(count))
    weight.grad = torch.rand(count)
    adamw = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0, fused=True)

    def run() -> None:
        assert weight.grad is not None
        torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
        weight.grad.mul_(0.999)
        adamw.step()

    return rate(run, ADAMW_BYTES * count)


def moved_rate(model: ModelCounts, rows: int, dtype: torch.dtype) -> Rate:
    """Of elementwise products of hidden states, several tensors in turn as a layer has them."""
    rows = max(1, min(rows, int(MOST_BYTES / 4 / (_SETS * model.hidden * model.width))))
    tensors = [torch.randn(rows, model.hidden, dtype=dtype) for _ in range(_SETS)]
    moved = _SETS * 3 * tensors[0].nbytes

    def run() -> None:
        for left, right in itertools.pairwise([*tensors, tensors[0]]):
            torch.mul(left, right)

    return rate(run, moved)


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

    return rate(run, count_operations(run))
