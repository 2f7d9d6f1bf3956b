"""The work of one optimizer step, counted: rows, query-key pairs, operations and bytes by phase.

Everything here is arithmetic on lengths and on a model's counts per token (`plan_trace.py`); no
machine is in it. A response's last token predicts nothing and stays out of the network, a prefix is
computed once for its group, a live teacher reads the student's question, and a group that does not
fit into a micro-batch goes in parts (`deferred.py`):

    student                         Q + G (R - 1)
    teacher, one feedback text      Q + F + G (R - 1)          live: F + G (R - 1)
    teacher, one for each response  Q + G (F + R - 1)          live: 1 + G (F + R - 1)
    nothing shared                  G (Q + R - 1) and G (Q + F + R - 1)
    split into p parts, deferred    student: Q - 1 without gradient, p + G (R - 1) and Q - 1 with

n rows below p positions that they see have n p + n (n + 1) / 2 pairs. A pair costs 4 N H operations
a layer forward (scores, values) and 10 N H backward. The loss head: 2 D V a row for each product.

Q, F, R: tokens of question, feedback, response; G responses a question; D hidden, V vocabulary, N
heads, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from fastsd.plan_trace import ModelCounts, Pass, Product

# Of the in-process sampler (fastsd/decoding.py).
_PREFILL_TOKENS = 16384
# A parameter's bytes in an AdamW step, fp32: the norm and the clipping (12), then gradient, master
# and both moments read and the last three written (28); a bf16 model's casts and copies (10).
_ADAMW_BYTES, _CAST_BYTES = 40, 10
# Bytes that row kernels move for a logit of each stream, forward and backward (LOG.md: 30 a pair).
_LOGIT_BYTES = (8, 7)


class Rows(NamedTuple):
    """Rows through the network, their query-key pairs in one layer and head, in so many passes."""

    tokens: float = 0
    pairs: float = 0
    passes: float = 0

    def __add__(self, other: Rows) -> Rows:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Rows(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Rows:
        return Rows(*(count * value for value in self))


@dataclass(frozen=True)
class Lengths:
    """Tokens of question, feedback and response; samples of a question; the longest response."""

    question: int
    feedback: int
    response: int
    samples: int
    longest_response: int


@dataclass(frozen=True)
class Step:
    """One rank's optimizer step.

    teacher: none, "group" (one feedback text) or "own" (one for each response). live: it has the
    student's weights. budget: optim.micro_batch_tokens. defers: a split group's prefix waits for
    its parts; else each part computes it anew. shared: False counts what full rows would cost.
    """

    lengths: Lengths
    questions: int
    teacher: Literal["none", "group", "own"]
    live: bool
    budget: int
    defers: bool
    batch_rows: int
    policy: bool
    shared: bool = True


class Use(NamedTuple):
    """A matrix product that runs in each of `passes` calls `times` times, over `tokens` in all."""

    product: Product
    times: int
    tokens: float
    passes: float

    @property
    def flop(self) -> float:
        return self.product.flop * self.times * self.tokens

    def bytes(self, width: int) -> float:
        """Operands read and results written once a call."""
        return self.times * self.product.bytes(self.tokens, self.passes, width)


@dataclass(frozen=True)
class Work:
    """One phase of one rank.

    moved_bytes: of everything that is neither a product nor attention. operations: calls on the
    device. link_bytes: received from other ranks.
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

    @property
    def flop(self) -> float:
        return self.attention_flop + sum(use.flop for use in self.products)

    def bytes(self, width: int) -> float:
        """Read from and written to memory."""
        products = sum(use.bytes(width) for use in self.products)
        return products + self.attention_bytes + self.moved_bytes


class Group(NamedTuple):
    """A group's rows by role. ahead: the student's without gradient."""

    student: Rows
    ahead: Rows
    teacher: Rows


class Packs(NamedTuple):
    """How groups lie in micro-batches: whole, or one in `parts`. Of the largest pass: the student's
    and the teacher's tokens (with what they read), and its responses."""

    micro_batches: int
    parts: int
    student_tokens: float
    teacher_tokens: float
    responses: int


def pairs(rows: float, above: float) -> float:
    return rows * above + rows * (rows + 1) / 2


def _tree(prefix: float, branch: float, branches: float, read: float = 0) -> Rows:
    """A prefix, whose first `read` rows are not computed, and equal branches below it."""
    own = prefix - read
    return Rows(own + branches * branch, pairs(own, read) + branches * pairs(branch, prefix))


def group_rows(step: Step, parts: int = 1) -> Group:
    """Rows and pairs of one group that goes in `parts`; passes are not counted."""
    at, fed = step.lengths, step.lengths.response - 1
    if not step.shared:
        student = _tree(at.question, fed, 1).times(at.samples)
        full = _tree(at.question + at.feedback, fed, 1).times(at.samples)
        return Group(student, Rows(), full if step.teacher != "none" else Rows())
    prefix, branch = _teacher_tree(step)
    if parts > 1 and step.defers:
        ahead = _tree(at.question - 1, 0, 0)
        read = min(at.question - 1, prefix - 2) if step.live else 0
        student = ahead + _parts(at.question, fed, at.samples, parts)
        teacher = _tree(prefix - 1, 0, 0, read) + _parts(prefix, branch, at.samples, parts)
        return Group(student, ahead, teacher if step.teacher != "none" else Rows())
    read = (at.question if step.teacher == "group" else at.question - 1) if step.live else 0
    again = parts - 1
    student = _tree(at.question, fed, at.samples) + _tree(at.question, 0, 0).times(again)
    teacher = _tree(prefix, branch, at.samples, read) + _tree(prefix, 0, 0, read).times(again)
    return Group(student, Rows(), teacher if step.teacher != "none" else Rows())


def _teacher_tree(step: Step) -> tuple[int, int]:
    """Tokens of the teacher's prefix and of each branch."""
    at, fed = step.lengths, step.lengths.response - 1
    own = step.teacher == "own"
    return (at.question, at.feedback + fed) if own else (at.question + at.feedback, fed)


def _parts(prefix: float, branch: float, branches: int, parts: int) -> Rows:
    """Branches below a prefix of which each part computes the last row."""
    return Rows(1, prefix).times(parts) + _tree(prefix, branch, branches, prefix)


def packs(step: Step, questions: int | None = None) -> Packs:
    """Micro-batches of equal groups under the budget, as `fastsd.layout.micro_batches` makes them:
    whole groups together, or one group in parts."""
    at, fed = step.lengths, step.lengths.response - 1
    questions = step.questions if questions is None else questions
    prefix, branch = _teacher_tree(step) if step.teacher != "none" else (0, 0)
    student, teacher = at.question + at.samples * fed, prefix + at.samples * branch
    if not step.shared:
        student = at.samples * (at.question + fed)
        teacher = at.samples * (prefix + at.feedback * (step.teacher == "own") + fed)
        teacher *= step.teacher != "none"
    whole = max(student, teacher)
    if whole <= step.budget or at.samples == 1:
        together = max(1, min(questions, step.budget // max(whole, 1)))
        count = math.ceil(questions / together)
        responses = together * at.samples
        return Packs(count, 1, together * student, together * teacher, responses)
    # A part holds the prefix's last token (deferred) or all of it.
    start = 1 if step.defers else max(at.question, prefix)
    each = max(1, min(at.samples, (step.budget - start) // max(fed, branch, 1)))
    parts = math.ceil(at.samples / each)
    student, teacher = (each * fed + at.question, each * branch + prefix)
    return Packs(questions, parts, student, teacher * (step.teacher != "none"), each)


def count_step(model: ModelCounts, step: Step) -> list[Work]:
    """The phases of one rank's step, in order; the critic's are counted by `generation`."""
    at, made, group = step.lengths, packs(step), group_rows(step, packs(step).parts)
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
    d_hidden = Product(model.hidden, model.vocabulary, 1)
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
    casts = _CAST_BYTES if model.width < 4 else 0
    each = _ADAMW_BYTES + casts + (calls - 1) * (12 + model.width)
    return Work("optimizer", moved_bytes=model.trainable * each, passes=1)


def over_ranks(model: ModelCounts, works: list[Work], ranks: int, inprocess: bool) -> list[Work]:
    """The same phases with the weights sharded: what each rank receives, and its optimizer's part.

    Layers are gathered for each pass forward and backward, the root once a step, and all of them
    once for rollouts; gradients are summed in fp32 after each backward pass.
    """
    if ranks == 1:
        return works
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
