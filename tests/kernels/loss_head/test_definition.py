"""The reference is the definition: checked against formulas written out row by row in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.testing import loss_head_inputs

T, D, V = 5, 4, 11
CASES = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.3},
    {"divergence": "jsd", "beta": 0.0},
    {"divergence": "jsd", "beta": 1.0},
    {"divergence": "sampled_token"},
    {"divergence": "forward_kl", "top_k": 3},
    {"divergence": "reverse_kl", "top_k": 3},
    {"divergence": "jsd", "beta": 0.7, "top_k": 3, "tail": False},
    {"divergence": "reverse_kl", "top_k": V, "tail": False},
    {"divergence": "forward_kl", "entry_clip": 0.02},
    {"divergence": "reverse_kl", "entry_clip": 0.02, "clip": 0.2},
    {"softcap": 1.5, "temperature": 1.3, "logit_scale": 0.8, "clip": 0.3},
]


def naive_probabilities(hidden, head, bias, temperature=1.0, logit_scale=1.0, softcap=None, **_):
    z = [sum(hidden[i] * head[j, i] for i in range(D)) + bias[j] for j in range(V)]
    z = [x * logit_scale for x in z]
    if softcap:
        z = [softcap * torch.tanh(x / softcap) for x in z]
    e = [torch.exp(x / temperature) for x in z]
    return [x / sum(e) for x in e]


def kl(a, b):
    return [x * torch.log(x / y) for x, y in zip(a, b, strict=True)]


def naive_divergence(s, t, divergence="forward_kl", beta=0.5, top_k=None, tail=True,
                     entry_clip=None, **_):  # fmt: skip
    if top_k:
        order = sorted(range(V), key=lambda j: -float(s[j].detach()))
        head, rest = order[:top_k], order[top_k:]
        s, t = ([p[j] for j in head] + [sum([p[j] for j in rest])] for p in (s, t))
        s, t = (s, t) if tail and rest else (s[:top_k], t[:top_k])
        s, t = [x / sum(s) for x in s], [x / sum(t) for x in t]
    if divergence == "jsd" and beta == 0:
        divergence = "forward_kl"
    if divergence == "jsd" and beta == 1:
        divergence = "reverse_kl"
    if divergence == "forward_kl":
        entries = kl(t, s)
    elif divergence == "reverse_kl":
        entries = kl(s, t)
    else:
        m = [(1 - beta) * x + beta * y for x, y in zip(s, t, strict=True)]
        pairs = zip(kl(t, m), kl(s, m), strict=True)
        entries = [beta * x + (1 - beta) * y for x, y in pairs]
    if entry_clip:
        entries = [torch.clamp(x, max=entry_clip) for x in entries]
    return sum(entries)


def naive_loss(x, clip=None, **options):
    total, divergences = 0.0, []
    for r in range(T):
        s = naive_probabilities(x["student_TD"][r], x["head_VD"], x["bias_V"], **options)
        with torch.no_grad():
            t = naive_probabilities(x["teacher_TD"][r], x["head_VD"], x["bias_V"], **options)
        y = int(x["target_T"][r])
        if options.get("divergence") == "sampled_token":
            d = (torch.log(s[y]) - torch.log(t[y])).detach()
            total = total + x["divergence_weight_T"][r] * d * torch.log(s[y])
        else:
            d = naive_divergence(s, t, **options)
            total = total + x["divergence_weight_T"][r] * d
        divergences.append(float(d.detach()))
        ratio = s[y] / math.exp(x["old_logprob_T"][r])
        w = x["policy_weight_T"][r]
        surrogate = ratio * w
        if clip:
            surrogate = torch.minimum(surrogate, ratio.clamp(1 - clip, 1 + clip) * w)
        entropy = -sum(p * torch.log(p) for p in s)
        total = total - surrogate - x["entropy_weight_T"][r] * entropy
    return total, divergences


@pytest.mark.parametrize("options", CASES, ids=str)
def test_reference_is_the_written_out_formula(options):
    x = loss_head_inputs(T, D, V)
    exact, divergences = naive_loss(x, **options)
    wrt = (x["student_TD"], x["head_VD"], x["bias_V"])
    exact_gradients = torch.autograd.grad(exact, wrt)
    found = fused_linear_loss(**x, **options, impl="reference")
    assert found.loss.item() == pytest.approx(exact.item(), rel=1e-12)
    assert found.divergence_T.tolist() == pytest.approx(divergences, rel=1e-10, abs=1e-14)
    for g, e in zip(torch.autograd.grad(found.loss, wrt), exact_gradients, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_policy_gradient_without_old_logprobs():
    x = loss_head_inputs(T, D, V)
    found = fused_linear_loss(
        x["student_TD"], x["head_VD"], x["target_T"],
        policy_weight_T=x["policy_weight_T"], impl="reference",
    )  # fmt: skip
    logits = x["student_TD"] @ x["head_VD"].T
    exact_T = torch.nn.functional.cross_entropy(logits, x["target_T"], reduction="none")
    exact = (exact_T * x["policy_weight_T"]).sum().item()
    assert found.loss.item() == pytest.approx(exact, rel=1e-12)
    assert found.divergence_T is None and found.teacher_logprob_T is None


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradcheck(options, impl):
    if options.get("divergence") == "sampled_token":
        options = {}  # its gradient is a stop-gradient surrogate, not the value's derivative
    if "top_k" in options:
        options = {**options, "top_k": min(options["top_k"], 7)}
    x = loss_head_inputs(3, D, 7, seed=1)
    # The teacher's use of the head and bias is a constant, so they get a copy, or no bias.
    x["teacher_head_VD"] = x["head_VD"].detach().clone()
    wrt = [x.pop("student_TD"), x.pop("head_VD")]
    x["bias_V"] = x["bias_V"].detach()

    def loss(student_TD, head_VD):
        return fused_linear_loss(student_TD, head_VD, **x, **options, impl=impl).loss

    assert torch.autograd.gradcheck(loss, wrt)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradcheck_of_the_bias(impl):
    x = loss_head_inputs(3, D, 7, seed=2)
    names = ("student_TD", "head_VD", "target_T", "policy_weight_T", "entropy_weight_T")
    x, bias_V = {name: x[name] for name in names}, x["bias_V"]
    assert torch.autograd.gradcheck(
        lambda b: fused_linear_loss(**x, bias_V=b, softcap=2.0, impl=impl).loss, (bias_V,)
    )
