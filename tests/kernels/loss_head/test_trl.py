"""Parity with TRL: divergences, top-k self-distillation, sampled token, IS clip, PPO clip."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.testing import FP32_ERROR, loss_head_inputs, relative_error

T, D, V = 40, 12, 90
TEMPERATURE = 1.1
# TRL's alpha by our setting: alpha 0 is KL(T||S), 1 is KL(S||T), between them the JSD.
ALPHAS = [("forward_kl", 0.5, 0.0), ("reverse_kl", 0.5, 1.0), ("jsd", 0.25, 0.25),
          ("jsd", 0.0, 0.0), ("jsd", 1.0, 1.0), ("jsd", 0.8, 0.8)]  # fmt: skip


@pytest.fixture(scope="module")
def loss_utils():
    """Not at collection, which every run of any test pays for."""
    return import_module("trl_training").loss_utils


def make(dtype):
    x = loss_head_inputs(T, D, V, dtype)
    x = {k: x[k] for k in ("student_TD", "head_VD", "target_T", "teacher_TD")}
    return x | {"divergence_weight_T": torch.rand(T, dtype=dtype)}


def trl_logits(x):
    student = x["student_TD"] @ x["head_VD"].T / TEMPERATURE
    with torch.no_grad():
        teacher = x["teacher_TD"] @ x["head_VD"].T / TEMPERATURE
    return student, teacher


def check_parity(x, per_token_T, impl, budget, **options):
    wrt = (x["student_TD"], x["head_VD"])
    theirs = (x["divergence_weight_T"] * per_token_T).sum()
    ours = fused_linear_loss(**x, temperature=TEMPERATURE, impl=impl, **options)
    assert relative_error(ours.loss.detach(), theirs.detach()) <= budget
    if options["divergence"] != "sampled_token":
        assert relative_error(ours.divergence_T, per_token_T.detach()) <= budget
    exact = torch.autograd.grad(theirs, wrt)
    for found, gradient in zip(torch.autograd.grad(ours.loss, wrt), exact, strict=True):
        assert relative_error(found, gradient) <= budget


@pytest.mark.parametrize("dtype, budget", [(torch.float64, 1e-11), (torch.float32, FP32_ERROR)])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("divergence, beta, alpha", ALPHAS)
def test_compute_divergence(divergence, beta, alpha, impl, dtype, budget, loss_utils):
    x = make(dtype)
    student, teacher = trl_logits(x)
    per_token_T = loss_utils.compute_divergence(
        student.log_softmax(-1), teacher.log_softmax(-1), alpha
    )
    check_parity(x, per_token_T, impl, budget, divergence=divergence, beta=beta)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence, beta, alpha", ALPHAS)
def test_topk_self_distillation(divergence, beta, alpha, tail, impl, loss_utils):
    x = make(torch.float64)
    per_token_T = loss_utils.compute_topk_self_distillation_loss(
        *trl_logits(x), distillation_topk=9, distillation_alpha=alpha, distillation_add_tail=tail
    )
    check_parity(x, per_token_T, impl, 1e-11, divergence=divergence, beta=beta, top_k=9, tail=tail)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_sampled_token(impl, loss_utils):
    x = make(torch.float64)
    student, teacher = (z[None] for z in trl_logits(x))
    per_token_T = loss_utils.compute_sampled_token_self_distillation_loss(
        student, teacher, x["target_T"][None], distillation_alpha=1.0
    )[0]
    check_parity(x, per_token_T, impl, 1e-11, divergence="sampled_token")


def test_importance_sampling_clip_is_a_divergence_weight(loss_utils):
    """SDPO's min(exp(log p_S - log p_old), 2) has no gradient: it is a weight from statistics."""
    x = make(torch.float64)
    student, teacher = trl_logits(x)
    per_token_T = loss_utils.compute_divergence(
        student.log_softmax(-1), teacher.log_softmax(-1), 1.0
    )
    logprob_T = student.log_softmax(-1).gather(1, x["target_T"][:, None])[:, 0]
    old_T = logprob_T.detach() + torch.randn(T, dtype=torch.float64)
    theirs = loss_utils.apply_importance_sampling_clipping(per_token_T, logprob_T, old_T, 2.0).sum()
    del x["divergence_weight_T"]
    now_T = fused_linear_statistics(**x, temperature=TEMPERATURE).student_logprob_T
    weight_T = (now_T - old_T).clamp(-20, 20).exp().clamp(max=2.0)
    ours = fused_linear_loss(
        **x, divergence_weight_T=weight_T, divergence="reverse_kl", temperature=TEMPERATURE
    ).loss
    assert relative_error(ours.detach(), theirs.detach()) <= 1e-11
    wrt = (x["student_TD"], x["head_VD"])
    for a, b in zip(torch.autograd.grad(ours, wrt), torch.autograd.grad(theirs, wrt), strict=True):
        assert relative_error(a, b) <= 1e-11


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_ppo_clip_as_in_grpo(impl):
    """GRPOTrainer's coef_1, coef_2 and -min(coef_1 A, coef_2 A), written out."""
    x = make(torch.float64)
    logprob_T = trl_logits(x)[0].log_softmax(-1).gather(1, x["target_T"][:, None])[:, 0]
    old_T = logprob_T.detach() + 0.4 * torch.randn(T, dtype=torch.float64)
    advantage_T = torch.randn(T, dtype=torch.float64)
    coef_1 = torch.exp(logprob_T - old_T)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.2)
    theirs = -torch.min(coef_1 * advantage_T, coef_2 * advantage_T)
    clipped = ((coef_1 < 0.8) & (advantage_T < 0)) | ((coef_1 > 1.2) & (advantage_T > 0))
    ours = fused_linear_loss(
        x["student_TD"], x["head_VD"], x["target_T"], policy_weight_T=advantage_T,
        old_logprob_T=old_T, clip=0.2, temperature=TEMPERATURE, impl=impl,
    )  # fmt: skip
    assert clipped.any() and torch.equal(ours.policy_clipped_T, clipped)
    assert relative_error(ours.loss.detach(), theirs.sum().detach()) <= 1e-11
    wrt = (x["student_TD"], x["head_VD"])
    exact = torch.autograd.grad(theirs.sum(), wrt)
    for found, gradient in zip(torch.autograd.grad(ours.loss, wrt), exact, strict=True):
        assert relative_error(found, gradient) <= 1e-11
