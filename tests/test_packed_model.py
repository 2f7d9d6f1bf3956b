"""Packed token trees against full rows: hidden states, loss, every parameter's gradient."""

import pytest
import torch
from tiny_models import ARCHITECTURES, build_tiny
from unpacked import everything_in_fp64, unpacked_hidden

from fastsd.config import LoraConfig, ModelConfig
from fastsd.model import load_policy
from fastsd.types import Branch, TokenTree
from fastsd_kernels import fused_linear_loss

RESPONSES = (((9, 10, 11, 12), (13,), (14, 15, 16)), ((21,),), ((53, 54), (60, 61, 62)))
QUESTIONS = ((5, 6, 7), (20,), tuple(range(30, 47)))
CONTEXTS = (((70, 71), (72,), (70, 73, 74, 75)), ((76, 77),), ((), (78,)))

STUDENT = [
    TokenTree(question, tuple(Branch((), response) for response in responses))
    for question, responses in zip(QUESTIONS, RESPONSES, strict=True)
]
TEACHER = [
    TokenTree(question, tuple(map(Branch, contexts, responses)))
    for question, contexts, responses in zip(QUESTIONS, CONTEXTS, RESPONSES, strict=True)
]
LORA = LoraConfig(r=4, alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    return str(build_tiny(request.param, tmp_path_factory.mktemp(request.param)))


def load(folder, dtype, lora, checkpointing):
    options = {"lora": lora, "gradient_checkpointing": checkpointing}
    torch.manual_seed(0)
    policy = load_policy(ModelConfig(name=folder, **options), "cpu", torch.float32)
    policy.model.to(dtype)
    with torch.no_grad():  # B starts at zero, which would hide a wrong A
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return policy


def run(policy, hidden):
    """(student's and teacher's hidden states, loss) and gradients, by parameter name."""
    student_AD = hidden(STUDENT)
    with torch.no_grad():
        teacher_AD = hidden(TEACHER)
    target_A = torch.tensor([i for group in RESPONSES for ids in group for i in ids])
    weight_A = torch.linspace(0.5, 1.5, len(target_A))
    out = fused_linear_loss(
        student_AD,
        policy.head_VD,
        target_A,
        teacher_TD=teacher_AD,
        divergence="reverse_kl",
        divergence_weight_T=weight_A,
        policy_weight_T=weight_A.flip(0),
        impl="reference",
    )
    policy.model.zero_grad()
    out.loss.backward()
    named = policy.model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.requires_grad}
    return (student_AD.detach(), teacher_AD, out.loss.detach()), gradients


def error(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_packed_equals_unpacked(folder, dtype, lora, checkpointing, monkeypatch):
    policy = load(folder, dtype, lora, checkpointing)
    if dtype == torch.float64:
        everything_in_fp64(policy, monkeypatch)
    want, want_gradients = run(policy, lambda trees: unpacked_hidden(policy, trees))
    got, gradients = run(policy, policy.hidden)
    errors = {
        name: error(a, b)
        for name, a, b in zip(("student", "teacher", "loss"), got, want, strict=True)
    }
    assert gradients.keys() == want_gradients.keys()
    errors |= {name: error(gradients[name], grad) for name, grad in want_gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    print(worst, errors[worst])
    assert errors[worst] <= TOLERANCE[dtype], f"{worst}: {errors[worst]:.2e}"
