"""The loss head's problem, its floor, its definition and our implementations of it.

Every contestant gets the same tensors and returns the same named results: for an operation that
trains the loss and its gradients in the student's hidden states and the head (from
`torch.autograd.grad`), for `statistics` the values by token that it has. The teacher is the student
with noise, as in self-distillation, and both use one head.

Operations: forward_kl = KL(T||S), reverse_kl = KL(S||T), jsd with beta 0.5, cross_entropy
(-log p_S(y), one stream), all forward + backward; statistics: forward only.
Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.loss_head import implementation_name

DISTILLATION = ("reverse_kl", "forward_kl", "jsd")
OPERATIONS = (*DISTILLATION, "statistics", "cross_entropy")
# Names of our implementations worth timing; `reference` is the definition.
OURS = ("native", "triton", "chunked")
# GEMMs of 2 T D V operations each: logits of each stream, then d hidden and d head.
_GEMMS = {"statistics": 2, "cross_entropy": 3}
Shape = tuple[int, int, int]
Results = dict[str, Tensor]


def parse_shape(text: str) -> Shape:
    """(T, D, V) of text such as 512x576x49152; raises ValueError for anything else."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise ValueError(f"expected TxDxV, for example 512x576x49152, got {text!r}")
    tokens, width, vocabulary = (int(x) for x in text.split("x"))
    return tokens, width, vocabulary


@dataclass(frozen=True)
class Problem:
    """Inputs of one shape. The student's hidden states and the head require gradients."""

    student_TD: Tensor
    teacher_TD: Tensor
    head_VD: Tensor
    target_T: Tensor

    @property
    def shape(self) -> Shape:
        return (*self.student_TD.shape, self.head_VD.shape[0])  # type: ignore[return-value]

    def rows(self, count: int) -> Problem:
        """The problem of the first `count` tokens."""
        kept = (self.student_TD.detach()[:count].clone().requires_grad_(), self.teacher_TD[:count])
        return Problem(*kept, self.head_VD, self.target_T[:count])

    def double(self) -> Problem:
        leaves = [x.detach().double().requires_grad_() for x in (self.student_TD, self.head_VD)]
        return Problem(leaves[0], self.teacher_TD.double(), leaves[1], self.target_T)


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, logit_scale: float = 1.0
) -> Problem:
    """Random inputs; logits have about `logit_scale`, the teacher is 0.3 of noise away."""
    tokens, width, vocabulary = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    student_TD = normal(tokens, width)
    teacher_TD = (student_TD + 0.3 * normal(tokens, width)).to(dtype)
    head_VD = (normal(vocabulary, width) * (logit_scale * width**-0.5)).to(dtype)
    target_T = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    student_TD = student_TD.to(dtype).requires_grad_()
    return Problem(student_TD, teacher_TD, head_VD.requires_grad_(), target_T)


def flop(op: str, shape: Shape) -> int:
    """Operations of the GEMMs that `op` cannot do without; the softmax's are not counted."""
    return _GEMMS.get(op, 4) * 2 * math.prod(shape)


def least_bytes(op: str, shape: Shape, itemsize: int) -> int:
    """Inputs read once and gradients written once: the traffic no implementation avoids."""
    tokens, width, vocabulary = shape
    streams = 1 if op == "cross_entropy" else 2
    read = streams * tokens * width + vocabulary * width
    written = 0 if op == "statistics" else tokens * width + vocabulary * width
    return (read + written) * itemsize


class Unavailable(Exception):
    """This contestant does not run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """`loss` is a scalar with a graph, a sum over tokens unless `mean`; `statistics` by token.

    compiles: its first call compiles, which is timed apart.
    """

    title: str
    ops: tuple[str, ...]
    loss: Callable[[Problem, str], Tensor]
    statistics: Callable[[Problem], Results] | None = None
    mean: bool = False
    compiles: bool = False

    def runner(self, problem: Problem, op: str) -> Callable[[], Results]:
        """A call of `op` on `problem`; raises Unavailable where the contestant has none."""
        if op not in self.ops:
            raise Unavailable(f"{self.title} has no {op}")
        if op == "statistics":
            return lambda: self.statistics(problem)  # type: ignore[misc]

        def run() -> Results:
            loss = self.loss(problem, op)
            d_hidden, d_head = torch.autograd.grad(loss, (problem.student_TD, problem.head_VD))
            return {"loss": loss.detach(), "d_hidden": d_hidden, "d_head": d_head}

        return run


def floor(problem: Problem, op: str) -> Callable[[], None]:
    """The bare GEMMs of `op` through torch.mm into buffers that exist already."""
    student_TD, head_VD = problem.student_TD.detach(), problem.head_VD.detach()
    logits_TV = student_TD.new_empty(student_TD.shape[0], head_VD.shape[0])
    outputs = torch.empty_like(student_TD), torch.empty_like(head_VD)
    streams = (student_TD,) if op == "cross_entropy" else (student_TD, problem.teacher_TD)

    def run() -> None:
        for hidden_TD in streams:
            torch.mm(hidden_TD, head_VD.T, out=logits_TV)
        if op != "statistics":
            torch.mm(logits_TV, head_VD, out=outputs[0])
            torch.mm(logits_TV.T, student_TD, out=outputs[1])

    return run


def ours(impl: str, device: torch.device, dtype: torch.dtype) -> Contestant:
    """`fused_linear_loss(impl=...)`; raises Unavailable with the reason that the package gives."""

    def loss(problem: Problem, op: str) -> Tensor:
        p = problem
        if op == "cross_entropy":
            terms: dict[str, Any] = {
                "policy_weight_T": torch.ones_like(p.target_T, dtype=torch.float32)
            }
        else:
            terms = {"teacher_TD": p.teacher_TD, "divergence": op}
        return fused_linear_loss(p.student_TD, p.head_VD, p.target_T, impl=impl, **terms).loss

    def statistics(problem: Problem) -> Results:
        p = problem
        found = fused_linear_statistics(
            p.student_TD, p.head_VD, p.target_T,
            teacher_TD=p.teacher_TD, divergence="reverse_kl", impl=impl,
        )  # fmt: skip
        names = ("student_logprob_T", "teacher_logprob_T", "entropy_T", "divergence_T")
        return {name: getattr(found, name) for name in names}

    try:
        implementation_name(impl, device, dtype)
    except RuntimeError as reason:
        raise Unavailable(str(reason)) from reason
    return Contestant(f"fastsd {impl}", OPERATIONS, loss, statistics)


def exact(problem: Problem, op: str) -> Results:
    """The definition in fp64 on the same inputs."""
    reference = ours("reference", problem.student_TD.device, torch.float64)
    return reference.runner(problem.double(), op)()
