"""What a training half costs by counting: tokens, floating point operations, and the GEMM rate.

Q, F, R are the tokens of question, feedback and response, G the responses. Rows through the network
(a response's last token predicts nothing and stays out; the teacher is live and reads the student's
question):

    student                         Q + G (R - 1)
    teacher, one feedback text      F + G (R - 1)
    teacher, one for each response  1 + G (F + R - 1)       its prefix's last row is its own
    nothing shared                  G (Q + R - 1) and G (Q + F + R - 1)

n rows below p positions that they see have n p + n (n + 1) / 2 query-key pairs.

Operations, a multiplication and an addition being two; D hidden, I ffn, N heads, K key/value heads,
H head dim, V vocabulary, P = layers (2 D N H + 2 D K H + 3 D I) weights of the linear layers:

    linear      2 P a row forward, 4 P backward; the student has both, the teacher the first
    attention   4 N H layers a pair forward (scores, values), 10 N H layers backward (scores
                again; d weights, d values, d queries, d keys)
    head        4 products of 2 G R D V: logits of both, d hidden, d head
Norms, rotations, activations and softmaxes are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.train_step.problem import Configuration, Lengths
from bench.train_step.worker import Channel, serve

# Forward passes that a row of the student costs: one, and twice that backward.
STUDENT_UNITS = 3
CONDITIONS = ("grpo", "reference", "critique")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Rows(NamedTuple):
    """Rows through the network, and their query-key pairs in one layer and head."""

    tokens: int
    pairs: int


@dataclass(frozen=True)
class Work:
    """One training half."""

    student: Rows
    teacher: Rows

    @property
    def units(self) -> int:
        """Rows in units of a forward pass."""
        return STUDENT_UNITS * self.student.tokens + self.teacher.tokens


def count(at: Lengths, condition: str, shared: bool = True) -> Work:
    """The rows of a training half. condition: grpo (no teacher), reference (one feedback text) or
    critique (one for each response). shared: False for G questions with one response each and a
    teacher of other weights. Raises ValueError for another condition."""
    if condition not in CONDITIONS:
        raise ValueError(f"condition: expected {', '.join(CONDITIONS)}, got {condition!r}")
    fed, groups = at.response - 1, 1 if shared else at.samples
    branches = at.samples // groups
    read = at.question if shared else 0
    student = _tree(at.question, fed, branches)
    if condition == "grpo":
        teacher = Rows(0, 0)
    elif condition == "critique" and shared:
        teacher = _tree(at.question, at.feedback + fed, branches, read - 1)
    else:
        teacher = _tree(at.question + at.feedback, fed, branches, read)
    return Work(*(Rows(groups * tokens, groups * pairs) for tokens, pairs in (student, teacher)))


def _tree(prefix: int, branch: int, branches: int, read: int = 0) -> Rows:
    """A prefix, whose first `read` rows are not computed, and equal branches below it."""
    tokens = prefix - read + branches * branch
    return Rows(tokens, _pairs(prefix - read, read) + branches * _pairs(branch, prefix))


def _pairs(rows: int, above: int) -> int:
    return rows * above + rows * (rows + 1) // 2


def linear_weights(c: Configuration) -> int:
    """P of the docstring."""
    attention = 2 * c.hidden * (c.heads + c.kv_heads) * c.head_dim
    return c.layers * (attention + 3 * c.hidden * c.ffn)


def flop(c: Configuration, at: Lengths, work: Work) -> dict[str, int]:
    """Operations by part of a training half that has a teacher."""
    a_pair = c.layers * c.heads * c.head_dim
    return {
        "linear": 2 * linear_weights(c) * work.units,
        "attention": a_pair * (14 * work.student.pairs + 4 * work.teacher.pairs),
        "head": 8 * at.samples * at.response * c.hidden * c.vocabulary,
    }


def run(settings: dict[str, Any], channel: Channel) -> None:
    """A worker that times square matrix products."""
    channel.send({})
    serve(lambda request: gemm(**request), channel)


def gemm(precision: str, size: int) -> dict[str, float]:
    """CPU and wall seconds of the fastest warm size x size product, and its operations.

    Products go through torch.mm and, in fp32, through oneDNN too: torch.mm takes another library
    there, which runs at under half the rate on AMD's processors.
    """
    left, right, out = torch.rand(3, size, size).to(DTYPES[precision])
    runs: list[Callable] = [lambda: torch.mm(left, right, out=out)]
    if precision == "fp32" and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        runs.append(lambda: linear(left, right, None, "none", [], ""))
    times = [_warm_seconds(run) for run in runs]
    cpu, wall = min(times)
    return {"cpu": cpu, "wall": wall, "flop": 2.0 * size**3}


def _warm_seconds(run: Callable) -> tuple[float, float]:
    run()
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall
