"""The work of one optimizer step, counted: operations and bytes by phase and role.

Everything here is arithmetic on rows (`rows.py`) and on what a token costs in the model
(`model.py`); no machine is in it. A query-key pair costs 4 N H operations a layer forward
(scores, values) and 10 N H backward (scores again; d weights, d values, d queries, d keys). The
loss head is four products of 2 D V a response token: logits of both roles, d hidden, d head.

D hidden, V vocabulary, N heads, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastsd.planning.model import ModelCounts
from fastsd.planning.rows import Rows, Step, group_rows, packs, pairs
from fastsd.planning.trace import Pass, Product

# Of the in-process sampler (fastsd/rollout/decoding.py).
_PREFILL_TOKENS = 16384
# A parameter's bytes in an AdamW step, fp32: the norm and the clipping (12), then gradient, master
# and both moments read and the last three written (28); a bf16 model's casts and copies (10).
ADAMW_BYTES, _CAST_BYTES = 40, 10


class LogitBytes(NamedTuple):
    """Read and written for a logit of each stream beside its products."""

    forward: int
    backward: int


# Of row kernels (LOG.md: 30 a pair).
_LOGIT_BYTES = LogitBytes(8, 7)


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

    moved_bytes: of everything that is neither a product nor attention; swept_bytes: of what is as
    large as weights. operations: calls on the device. link_bytes: received from other ranks.
    width: bytes of attention's elements.
    """

    phase: str
    products: tuple[Use, ...] = ()
    attention_flop: float = 0
    attention_bytes: float = 0
    moved_bytes: float = 0
    swept_bytes: float = 0
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
        return products + self.attention_bytes + self.moved_bytes + self.swept_bytes


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
    if model.tied and model.head_trainable:  # its gradient and the embedding's are added
        both = 3 * model.width * model.head_weights * calls
        backward = replace(backward, swept_bytes=backward.swept_bytes + both)
    responses = step.questions * at.samples * at.response
    return [
        *generation(model, step, "rollout"),
        network(model, "student forward", forward, model.forward, 4),
        network(model, "teacher forward", teacher, model.forward, 4),
        *head_works(model, responses, calls, streams(step), model.vocabulary, _LOGIT_BYTES),
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
        moved_bytes=through.bytes_a_token * rows.tokens,
        swept_bytes=through.bytes_a_pass * rows.passes,
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


def streams(step: Step) -> int:
    """Of hidden states that meet the head: the student's, and the teacher's where there is one."""
    return 2 if step.teacher != "none" else 1


def head_works(
    model: ModelCounts,
    rows: float,
    calls: float,
    streams: int,
    vocabulary: int,
    logit_bytes: LogitBytes,
) -> list[Work]:
    """Logits of student and teacher; then d hidden and, where it is trained, d head."""
    logits = streams * rows * vocabulary
    head = model.head._replace(outer=vocabulary)
    d_hidden = Product(model.hidden, vocabulary, 1, model.width)
    d_head = head._replace(sums_rows=True)
    backward = (d_hidden, d_head) if model.head_trainable else (d_hidden,)
    return [
        Work(
            f"loss head {way}",
            tuple(Use(product, times, rows, calls) for product, times in uses),
            moved_bytes=each * logits,
            tokens=rows,
            passes=calls,
        )
        for way, uses, each in (
            ("forward", ((head, streams),), logit_bytes.forward),
            ("backward", tuple((product, 1) for product in backward), logit_bytes.backward),
        )
    ]


def _optimizer(model: ModelCounts, calls: float) -> Work:
    """AdamW, and adding up the gradients of later micro-batches in fp32."""
    moved = ADAMW_BYTES * model.trainable + _CAST_BYTES * model.rounded
    moved += (calls - 1) * (12 * model.trainable + model.gradient_bytes)
    return Work("optimizer", swept_bytes=moved, passes=1)
