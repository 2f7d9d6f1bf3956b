"""The work of one optimizer step, counted: operations and bytes by phase and role.

Everything here is arithmetic on rows (`plan_rows.py`) and on what a token costs in the model
(`plan_model.py`); no machine is in it. A query-key pair costs 4 N H operations a layer forward
(scores, values) and 10 N H backward (scores again; d weights, d values, d queries, d keys). The
loss head is four products of 2 D V a response token: logits of both roles, d hidden, d head.

D hidden, V vocabulary, N heads, H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastsd.plan_model import ModelCounts
from fastsd.plan_rows import Rows, Step, group_rows, packs, pairs
from fastsd.plan_trace import Pass, Product

# Of the in-process sampler (fastsd/decoding.py).
_PREFILL_TOKENS = 16384
# A parameter's bytes in an AdamW step, fp32: the norm and the clipping (12), then gradient, master
# and both moments read and the last three written (28); a bf16 model's casts and copies (10).
_ADAMW_BYTES, _CAST_BYTES = 40, 10
# Bytes that row kernels move for a logit of each stream, forward and backward (LOG.md: 30 a pair).
_LOGIT_BYTES = (8, 7)


class Use(NamedTuple):
    """A matrix product that runs in each of `passes` calls `times` times, over `tokens` in all."""

    product: Product
    times: int
    tokens: float
    passes: float

    @property
    def flop(self) -> float:
        return self.product.flop * self.times * self.tokens

    @property
    def bytes(self) -> float:
        """Operands read and results written once a call."""
        return self.times * self.product.bytes(self.tokens, self.passes)


@dataclass(frozen=True)
class Work:
    """One phase of one rank.

    moved_bytes: of everything that is neither a product nor attention. operations: calls on the
    device. link_bytes: received from other ranks. width: bytes of attention's elements.
    """

    phase: str
    products: tuple[Use, ...] = ()
    attention_flop: float = 0
    attention_bytes: float = 0
    moved_bytes: float = 0
    operations: float = 0
    link_bytes: float = 0
    tokens: float = 0
    passes: float = 0
    width: int = 2

    @property
    def flop(self) -> float:
        return self.attention_flop + sum(use.flop for use in self.products)

    @property
    def bytes(self) -> float:
        """Read from and written to memory."""
        products = sum(use.bytes for use in self.products)
        return products + self.attention_bytes + self.moved_bytes


def count_step(model: ModelCounts, step: Step) -> list[Work]:
    """The phases of one rank's step, in order; the critic's are counted by `generation`."""
    at, made, group = step.lengths, packs(step), group_rows(step)
    calls = made.micro_batches * made.parts
    ahead = step.questions if group.ahead.tokens else 0
    student = group.student.times(step.questions)._replace(passes=calls + ahead)
    forward = student + group.ahead.times(step.questions)._replace(passes=ahead)
    teacher = group.teacher.times(step.questions)._replace(passes=calls)
    backward = network(model, "student backward", student, model.backward, 10)
    if model.checkpoints:  # attention runs again too
        backward = replace(backward, attention_flop=backward.attention_flop * 1.4)
    responses = step.questions * at.samples * at.response
    return [
        *generation(model, step, "rollout"),
        network(model, "student forward", forward, model.forward, 4),
        network(model, "teacher forward", teacher, model.forward, 4),
        *_head(model, responses, calls, 2 if step.teacher != "none" else 1),
        backward,
        _optimizer(model, calls),
    ]


def network(model: ModelCounts, phase: str, rows: Rows, through: Pass, pair_flop: int) -> Work:
    """All layers, one way. pair_flop: operations of a pair, in units of N H."""
    if not rows.tokens:
        return Work(phase)
    elements = 2 * (model.heads + model.kv_heads) * model.head_dim * model.layers
    return Work(
        phase,
        tuple(Use(p, times, rows.tokens, rows.passes) for p, times in through.products),
        attention_flop=pair_flop * model.layers * model.heads * model.head_dim * rows.pairs,
        attention_bytes=pair_flop / 4 * elements * model.width * rows.tokens,
        moved_bytes=through.bytes_a_token * rows.tokens + through.bytes_a_pass * rows.passes,
        operations=through.operations * rows.passes,
        tokens=rows.tokens,
        passes=rows.passes,
        width=model.width,
    )


def generation(model: ModelCounts, step: Step, role: str) -> list[Work]:
    """Prefill and decoding of step.questions x samples responses, rows decoded side by side."""
    at = step.lengths
    copies = 1 if step.shared else at.samples
    rows, fed = step.questions * at.samples, at.response - 1
    together = min(max(step.batch_rows, at.samples), rows)
    prompts = Rows(at.question, pairs(at.question, 0)).times(step.questions * copies)
    prompts = prompts._replace(passes=math.ceil(prompts.tokens / _PREFILL_TOKENS))
    prefill = network(model, f"{role} prefill", prompts, model.forward, 4)
    drawn = Use(model.head, 1, step.questions * copies, prompts.passes)
    steps = math.ceil(rows / together) * fed
    decode = Rows(rows * fed, rows * pairs(fed, at.question), steps)
    decoding = network(model, f"{role} decode", decode, model.forward, 4)
    # Each step reads the branches' keys and, once for its rows, the question's.
    positions = rows * pairs(fed, 0) + step.questions * copies * fed * at.question
    logits = 12 * model.vocabulary  # written, read by the softmax and by the draw
    return [
        replace(prefill, products=(*prefill.products, drawn)),
        replace(
            decoding,
            products=(*decoding.products, Use(model.head, 1, decode.tokens, steps)),
            attention_bytes=decoding.attention_bytes + model.kv_bytes * positions,
            moved_bytes=decoding.moved_bytes + logits * decode.tokens,
        ),
    ]


def _head(model: ModelCounts, responses: float, calls: float, streams: int) -> list[Work]:
    """Logits of student and teacher; then d hidden and, where it is trained, d head."""
    logits = streams * responses * model.vocabulary
    d_hidden = Product(model.hidden, model.vocabulary, 1, model.width)
    d_head = model.head._replace(sums_rows=True)
    backward = (d_hidden, d_head) if model.head_trainable else (d_hidden,)
    return [
        Work(
            f"loss head {way}",
            tuple(Use(product, times, responses, calls) for product, times in uses),
            moved_bytes=each * logits,
            tokens=responses,
            passes=calls,
        )
        for way, uses, each in (
            ("forward", ((model.head, streams),), _LOGIT_BYTES[0]),
            ("backward", tuple((product, 1) for product in backward), _LOGIT_BYTES[1]),
        )
    ]


def _optimizer(model: ModelCounts, calls: float) -> Work:
    """AdamW, and adding up the gradients of later micro-batches in fp32."""
    moved = _ADAMW_BYTES * model.trainable + _CAST_BYTES * model.rounded
    moved += (calls - 1) * (12 * model.trainable + model.gradient_bytes)
    return Work("optimizer", moved_bytes=moved, passes=1)


def over_ranks(
    model: ModelCounts, works: Sequence[Work], ranks: int, inprocess: bool
) -> list[Work]:
    """The same phases with the weights sharded: what each rank receives, and its optimizer's part.

    Layers are gathered for each pass forward and backward, the root once a step, and all of them
    once for rollouts; gradients are summed in fp32 after each backward pass.
    """
    if ranks == 1:
        return list(works)
    others = (ranks - 1) / ranks
    layers = (model.parameters - model.root) * model.width * others
    root = model.root * model.width * others
    sums = 4 * model.trainable * others
    received = {
        "rollout decode": lambda work: layers + root if inprocess else 0,
        "student forward": lambda work: layers * work.passes + root,
        "teacher forward": lambda work: layers * work.passes,
        "student backward": lambda work: (layers + sums) * work.passes,
    }
    return [
        replace(
            work,
            link_bytes=received.get(work.phase, lambda work: 0)(work),
            moved_bytes=work.moved_bytes / (ranks if work.phase == "optimizer" else 1),
        )
        for work in works
    ]
