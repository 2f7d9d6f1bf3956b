"""Policies and teachers: rows, positions, teachers, freezing. Gradients: test_packed_model.py."""

import pytest
import torch
from tiny_models import build_tiny_llama, build_tiny_qwen3
from unpacked import everything_in_fp64, unpacked_hidden

from fastsd.config.sections import LoraConfig, ModelConfig, TeacherConfig
from fastsd.errors import FastsdError
from fastsd.model import load_policy
from fastsd.model.packing import count_tokens
from fastsd.model.refusals import ModelError
from fastsd.teachers.self_teacher import Teacher
from fastsd.types import Branch, TokenTree

TREES = [
    TokenTree((5, 6, 7), (Branch((), (9, 10, 11, 12)), Branch((), (13,)), Branch((8,), (14, 15)))),
    TokenTree((20,), (Branch((), (21,)),)),
    TokenTree(tuple(range(30, 47)), (Branch((50, 51, 52), (53,)), Branch((50,), (60, 61, 62)))),
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory):
    build = {"llama": build_tiny_llama, "qwen3": build_tiny_qwen3}[request.param]
    return str(build(tmp_path_factory.mktemp(request.param)))


def load(folder, dtype=torch.float64, **options):
    return load_policy(ModelConfig(name=folder, **options), "cpu", dtype)


def gradients(policy, hidden_TD):
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(hidden_TD.shape, generator=generator, dtype=hidden_TD.dtype)
    policy.model.zero_grad()
    (hidden_TD * upstream).sum().backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def test_hidden_equals_the_plain_model_row_by_row(folder, monkeypatch):
    policy = load(folder)
    everything_in_fp64(policy, monkeypatch)
    hidden = policy.hidden(TREES)
    assert hidden.shape == (sum(len(b.response_ids) for tree in TREES for b in tree.branches), 32)
    # fp64 rounding through two layers; measured 1e-15.
    torch.testing.assert_close(hidden, unpacked_hidden(policy, TREES), rtol=0, atol=1e-12)


def test_one_forward_of_every_token_once(folder):
    policy = load(folder)
    seen = []
    policy.decoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    policy.hidden(TREES)
    assert seen == [(1, count_tokens(TREES).computed, 32)] == [(1, 8 + 1 + 23, 32)]
    with pytest.raises(FastsdError, match="without a prompt"):
        policy.hidden([TokenTree((), (Branch((), (1, 2)),))])
    with pytest.raises(FastsdError, match="response without tokens"):
        policy.hidden([TokenTree((5, 6), (Branch((), (1, 2)), Branch((7,), ())))])


def test_gradient_checkpointing_and_lora_give_the_same(folder):
    lora = LoraConfig(r=4, alpha=8, target_modules=["q_proj", "down_proj"])
    results = []
    recomputed = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = load(folder, lora=lora, gradient_checkpointing=checkpointing)
        with torch.no_grad():  # B starts at zero, which would hide a wrong A
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
        layer = policy.decoder.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, c=checkpointing: recomputed.append(c))
        hidden = policy.hidden(TREES)
        results.append((hidden.detach(), gradients(policy, hidden)))
        assert not policy.model.training
    # Forward once; checkpointed, once more in backward.
    assert recomputed == [False, True, True]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-12)
    assert results[0][1].keys() == results[1][1].keys()
    assert all("lora_" in name for name in results[0][1])
    for name, grad in results[0][1].items():
        assert (results[1][1][name] - grad).abs().max() <= 1e-6 * grad.abs().max(), name


def test_adapter_off_teacher_is_the_base(folder):
    lora = LoraConfig(r=4, alpha=8, target_modules=["q_proj"])
    base = load(folder).hidden(TREES)
    policy = load(folder, lora=lora)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    teacher = Teacher(policy, TeacherConfig(kind="adapter_off"))
    torch.testing.assert_close(teacher.hidden(TREES), base, rtol=0, atol=1e-12)
    assert (policy.hidden(TREES) - base).abs().max() > 1e-3
    assert not teacher.hidden(TREES).requires_grad


def test_teachers_follow_the_student_as_they_should(folder):
    policy = load(folder, dtype=torch.float32)
    teachers = {
        kind: Teacher(policy, TeacherConfig(kind=kind, ema_rate=0.25))
        for kind in ("live", "frozen", "ema")
    }
    before = policy.hidden(TREES).detach()
    name, weight = next(iter(policy.model.named_parameters()))
    start = weight.detach().clone()
    with torch.no_grad():
        weight += 1.0
    masters = dict(policy.model.named_parameters())
    for teacher in teachers.values():
        teacher.update(masters)
    assert torch.equal(teachers["live"].hidden(TREES), policy.hidden(TREES))
    assert torch.equal(teachers["frozen"].hidden(TREES), before)
    ema_weight = dict(teachers["ema"].policy.model.named_parameters())[name]
    torch.testing.assert_close(ema_weight, start + 0.25)
    restored = Teacher(policy, TeacherConfig(kind="ema", ema_rate=0.25))
    restored.load_state_tensors(teachers["ema"].state_tensors())
    assert torch.equal(restored.hidden(TREES), teachers["ema"].hidden(TREES))


def test_lora_checkpoint_folder_loads_merged(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = load(folder, lora=LoraConfig(r=4, alpha=8, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    want = policy.hidden(TREES)
    policy.save(tmp_path / "saved")
    assert torch.equal(policy.hidden(TREES), want)
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    got = load(str(tmp_path / "saved")).hidden(TREES)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_freeze_patterns(folder):
    policy = load(folder, freeze=["embed_tokens"])
    frozen = [n for n, p in policy.model.named_parameters() if not p.requires_grad]
    assert frozen and all("embed_tokens" in name for name in frozen)
    with pytest.raises(ModelError, match="no parameter's name contains 'embed_tokenz'"):
        load(folder, freeze=["embed_tokenz"])
    with pytest.raises(ModelError, match="nothing to train"):
        load(folder, freeze=["model"])


def test_a_copy_shares_what_is_frozen_and_nothing_else(folder):
    policy = load(folder, freeze=["embed_tokens"])
    teacher = Teacher(policy, TeacherConfig(kind="frozen"))
    copied = dict(teacher.policy.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        assert (copied[name] is parameter) == ("embed_tokens" in name)
        assert not copied[name].requires_grad
    own_head = policy.head_VD is not policy.decoder.get_input_embeddings().weight
    assert (teacher.head_VD is None) == (not own_head)
    trained = Teacher(load(folder), TeacherConfig(kind="frozen"))
    assert trained.head_VD is not None
