"""Rows through the network, by role, in micro-batches: arithmetic on lengths.

A response's last token predicts nothing and stays out of the network, a prefix is computed once for
its group, a live teacher reads the student's question, and a group that does not fit into a
micro-batch goes in parts (`deferred.py`):

    student                         Q + G (R - 1)
    teacher, one feedback text      Q + F + G (R - 1)          live: F + G (R - 1)
    teacher, one for each response  Q + G (F + R - 1)          live: 1 + G (F + R - 1)
    nothing shared                  G (Q + R - 1) and G (Q + F + R - 1)
    p parts, deferred, the student  Q - 1 without gradient, p + G (R - 1) and Q - 1 with

n rows below p positions that they see have n p + n (n + 1) / 2 query-key pairs.

Q, F, R: tokens of question, feedback, response; G responses a question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple


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
    shared: bool = True


class Group(NamedTuple):
    """A group's rows by role. ahead: the student's without gradient."""

    student: Rows
    ahead: Rows
    teacher: Rows


class Packs(NamedTuple):
    """How groups lie in micro-batches: whole, or one in `parts`, its prefix deferred or computed in
    each. Of the largest pass: the student's and the teacher's tokens (with what they read), and its
    responses."""

    micro_batches: int
    parts: int
    student_tokens: float
    teacher_tokens: float
    responses: int
    deferred: bool = False


def pairs(rows: float, above: float) -> float:
    return rows * above + rows * (rows + 1) / 2


def _tree(prefix: float, branch: float, branches: float, read: float = 0) -> Rows:
    """A prefix, whose first `read` rows are not computed, and equal branches below it."""
    own = prefix - read
    return Rows(own + branches * branch, pairs(own, read) + branches * pairs(branch, prefix))


def group_rows(step: Step) -> Group:
    """Rows and pairs of one group; passes are not counted."""
    at, fed = step.lengths, step.lengths.response - 1
    if not step.shared:
        student = _tree(at.question, fed, 1).times(at.samples)
        full = _tree(at.question + at.feedback, fed, 1).times(at.samples)
        return Group(student, Rows(), full if step.teacher != "none" else Rows())
    prefix, branch = _teacher_tree(step)
    made = packs(step)
    parts = made.parts
    if made.deferred:
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


def packs(step: Step) -> Packs:
    """Micro-batches of equal groups under the budget, as `fastsd.model.micro_batches` makes them:
    whole groups together, or one group in parts."""
    at, fed = step.lengths, step.lengths.response - 1
    questions = step.questions
    prefix, branch = _teacher_tree(step) if step.teacher != "none" else (0, 0)
    student, teacher = at.question + at.samples * fed, prefix + at.samples * branch
    if not step.shared:
        student = at.samples * (at.question + fed)
        teacher = at.samples * (prefix + at.feedback * (step.teacher == "own") + fed)
        teacher *= step.teacher != "none"
    whole = max(student, teacher)
    defers = step.defers and step.shared
    if whole <= step.budget or (at.samples == 1 and not defers):
        together = max(1, min(questions, step.budget // max(whole, 1)))
        count = math.ceil(questions / together)
        responses = together * at.samples
        return Packs(count, 1, together * student, together * teacher, responses)
    # A part holds the prefix's last token (deferred) or all of it.
    start = 1 if defers else max(at.question, prefix)
    each = max(1, min(at.samples, (step.budget - start) // max(fed, branch, 1)))
    parts = math.ceil(at.samples / each)
    student, teacher = (each * fed + at.question, each * branch + prefix)
    return Packs(questions, parts, student, teacher * (step.teacher != "none"), each, defers)
