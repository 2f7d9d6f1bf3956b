"""The public code that the loss head is measured against, each at its best settings.

Each factory says which settings those are and why, and raises Unavailable with the reason where
its contestant does not run. Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.problem import (
    DISTILLATION,
    OPERATIONS,
    Contestant,
    Problem,
    Results,
    Unavailable,
    ours,
)

# The generalised JSD's beta: 0 is KL(T||S), 1 is KL(S||T), in TRL, Liger and here.
_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# TRL's tile of vocabulary on a CPU: 1.6 times faster than the 32768 it ships (tuned for GPUs).
TRL_CPU_VOCABULARY_TILE = 4096


def eager(logits: torch.dtype, compiled: bool) -> Contestant:
    """What people write: operands cast to `logits`, then log-probs in fp32."""

    def loss(student_TD, teacher_TD, head_VD, target_T, op):
        student_TV = _log_probs(student_TD, head_VD, logits)
        if op == "cross_entropy":
            return -student_TV.gather(1, target_T[:, None]).sum()
        with torch.no_grad():
            teacher_TV = _log_probs(teacher_TD, head_VD, logits)
        if op == "jsd":
            mixture_TV = torch.logaddexp(student_TV, teacher_TV) - math.log(2)
            return (_kl(teacher_TV, mixture_TV) + _kl(student_TV, mixture_TV)).sum() / 2
        pair = (teacher_TV, student_TV) if op == "forward_kl" else (student_TV, teacher_TV)
        return _kl(*pair).sum()

    def statistics(student_TD, teacher_TD, head_VD, target_T):
        student_TV = _log_probs(student_TD, head_VD, logits)
        teacher_TV = _log_probs(teacher_TD, head_VD, logits)
        return {
            "student_logprob_T": student_TV.gather(1, target_T[:, None])[:, 0],
            "teacher_logprob_T": teacher_TV.gather(1, target_T[:, None])[:, 0],
            "entropy_T": -(student_TV.exp() * student_TV).sum(-1),
            "divergence_T": _kl(student_TV, teacher_TV).sum(-1),
        }

    if compiled:
        loss, statistics = (torch.compile(f, dynamic=False) for f in (loss, statistics))

    def observed(problem: Problem) -> Results:
        with torch.no_grad():
            p = problem
            return statistics(p.student_TD, p.teacher_TD, p.head_VD, p.target_T)

    return Contestant(
        f"{'torch.compile' if compiled else 'eager'}, {_NAMES[logits]} logits",
        OPERATIONS,
        lambda p, op: loss(p.student_TD, p.teacher_TD, p.head_VD, p.target_T, op),
        observed,
        compiles=compiled,
    )


def _log_probs(hidden_TD: Tensor, head_VD: Tensor, logits: torch.dtype) -> Tensor:
    return torch.log_softmax(F.linear(hidden_TD.to(logits), head_VD.to(logits)).float(), -1)


def _kl(from_TV: Tensor, to_TV: Tensor) -> Tensor:
    """Summands of KL(from||to)."""
    return F.kl_div(to_TV, from_TV, reduction="none", log_target=True)


def trl(device: torch.device) -> Contestant:
    """TRL's ChunkedDivergenceFunction; it has no log-probs of tokens, so no cross_entropy."""
    _need("trl")
    from trl.kernels import chunked_divergence

    if device.type == "cpu":
        chunked_divergence.VOCAB_CHUNK_SIZE = TRL_CPU_VOCABULARY_TILE

    def apply(p: Problem, beta: float) -> tuple[Tensor, Tensor]:
        teacher = (p.teacher_TD, p.head_VD.detach(), None)
        options = (beta, 1.0, 1.0, None, 1.0, None)
        return chunked_divergence.ChunkedDivergenceFunction.apply(
            p.student_TD, p.head_VD, None, *teacher, *options
        )

    def statistics(problem: Problem) -> Results:
        with torch.no_grad():
            divergence_T, entropy_T = apply(problem, 1.0)
        return {"entropy_T": entropy_T, "divergence_T": divergence_T}

    ops = (*DISTILLATION, "statistics")
    return Contestant(
        "TRL chunked divergence", ops, lambda p, op: apply(p, _BETA[op])[0].sum(), statistics
    )


def liger_chunked() -> Contestant:
    """Liger's LigerFusedLinearJSDLoss, plain torch on any device, at its defaults: compiled,
    chunks of 1024 tokens (smaller ones and uncompiled measured slower on a CPU). Its soft loss is
    a mean, so the soft weight is T: a sum without another pass over the gradients."""
    _need("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(p: Problem, op: str) -> Tensor:
        weights = {"weight_hard_loss": 0.0, "weight_soft_loss": float(p.target_T.shape[0])}
        module = LigerFusedLinearJSDLoss(beta=_BETA[op], **weights)
        teacher = (p.teacher_TD, p.head_VD.detach())
        return module(p.student_TD, p.head_VD, *teacher, p.target_T)

    return Contestant("Liger LigerFusedLinearJSDLoss", DISTILLATION, loss, compiles=True)


def liger_triton(device: torch.device) -> Contestant:
    """Liger's Triton fused_linear_jsd and fused_linear_cross_entropy, means over the tokens."""
    _need("liger_kernel")
    if device.type != "cuda":
        raise Unavailable("Liger's fused_linear_jsd is a Triton kernel: it needs CUDA")
    from liger_kernel.transformers import functional

    def loss(p: Problem, op: str) -> Tensor:
        if op == "cross_entropy":
            return functional.liger_fused_linear_cross_entropy(p.student_TD, p.head_VD, p.target_T)
        teacher = (p.teacher_TD, p.head_VD.detach())
        return functional.liger_fused_linear_jsd(
            p.student_TD, p.head_VD, *teacher, jsd_beta=_BETA[op]
        )

    ops = (*DISTILLATION, "cross_entropy")
    return Contestant("Liger fused_linear_jsd / _cross_entropy", ops, loss, mean=True)


def cce(device: torch.device) -> Contestant:
    """Apple's cut cross-entropy."""
    _need("cut_cross_entropy")
    if device.type != "cuda":
        raise Unavailable("cut_cross_entropy's kernels are Triton: they need CUDA")
    from cut_cross_entropy import linear_cross_entropy

    def loss(p: Problem, op: str) -> Tensor:
        return linear_cross_entropy(p.student_TD, p.head_VD, p.target_T, reduction="sum")

    return Contestant("apple cut_cross_entropy", ("cross_entropy",), loss)


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")


def factories(device: torch.device, dtype: torch.dtype) -> Mapping[str, Callable[[], Contestant]]:
    """Every contestant by the name used on command lines; a factory may raise Unavailable."""
    return {
        "native": lambda: ours("native", device, dtype),
        "triton": lambda: ours("triton", device, dtype),
        "chunked": lambda: ours("chunked", device, dtype),
        "eager": lambda: eager(dtype, compiled=False),
        "eager-fp32": lambda: eager(torch.float32, compiled=False),
        "compile": lambda: eager(dtype, compiled=True),
        "compile-fp32": lambda: eager(torch.float32, compiled=True),
        "trl": lambda: trl(device),
        "liger": liger_chunked,
        "liger-triton": lambda: liger_triton(device),
        "cce": lambda: cce(device),
    }
