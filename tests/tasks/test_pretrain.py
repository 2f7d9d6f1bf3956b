"""The supervised loop, the health gate, and a base trained for a moment."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastsd.tasks import pretrain
from fastsd.tasks.pretrain import Health, HealthGate, Recipe, completion_loss, fit

BATCH = [([2, 5], [6, 7, 1]), ([2, 5, 9, 8], [1]), ([3], [4, 4, 4, 4, 1])]


def tiny_model(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def test_completion_loss_is_the_masked_token_mean():
    model = tiny_model()
    length = max(len(p) + len(c) for p, c in BATCH)
    ids = torch.tensor([[*p, *c, *[0] * (length - len(p) - len(c))] for p, c in BATCH])
    mask = torch.tensor([[1] * (len(p) + len(c)) + [0] * (length - len(p) - len(c)) for p, c in BATCH])
    labels = ids.clone()
    for b, (prompt, completion) in enumerate(BATCH):
        labels[b, : len(prompt)] = -100
        labels[b, len(prompt) + len(completion) :] = -100
    # transformers' own masked loss, with an attention mask that ours does without
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    # A mean of 9 float32 terms near 2.4, in another order: a few units in the last place.
    torch.testing.assert_close(completion_loss(model, BATCH), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("example", [([], [1]), ([1], [])])
def test_empty_examples_are_errors(example):
    with pytest.raises(ValueError, match="example 1 .* empty"):
        completion_loss(tiny_model(), [([1], [1]), example])


def test_fit_follows_adamw():
    ours, theirs = tiny_model(), tiny_model()
    seen = []
    fit(
        ours,
        [BATCH] * 4,
        lr=1e-2,
        warmup_steps=2,
        betas=(0.8, 0.9),
        schedule=lambda update: 0.5 if update == 3 else 1.0,
        max_grad_norm=0.1,
        log=lambda update, loss: seen.append((update, loss)),
    )
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.8, 0.9), weight_decay=0.0)
    for update, rate in enumerate([0.5e-2, 1e-2, 1e-2, 0.5e-2]):
        optimizer.param_groups[0]["lr"] = rate
        loss = completion_loss(theirs, BATCH)
        assert seen[update] == (update + 1, loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Our two parameter groups add the gradient norm in another order: rounding only.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_weight_decay_skips_norms():
    plain, decayed = tiny_model(), tiny_model()
    fit(plain, [BATCH], lr=1e-2)
    fit(decayed, [BATCH], lr=1e-2, weight_decay=10.0)
    for (name, a), b in zip(plain.named_parameters(), decayed.parameters(), strict=True):
        assert torch.equal(a, b) == ("norm" in name), name


def test_bfloat16_models_have_float32_masters():
    """Rates far below bfloat16's resolution of 2^-8 must still add up over many updates."""
    model = tiny_model(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, [BATCH] * 60, lr=1e-4)
    norm = "model.norm.weight"  # ones: an update of 1e-4 on its own rounds away
    moved = (dict(model.named_parameters())[norm] - before[norm]).abs().max().item()
    assert model.dtype == torch.bfloat16
    assert moved >= 2**-8


def test_frozen_parameters_stay():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, [BATCH], lr=1e-2, weight_decay=0.1, freeze=["embed_tokens", "norm"])
    for name, parameter in model.named_parameters():
        frozen = "embed_tokens" in name or "norm" in name
        assert torch.equal(parameter, before[name]) == frozen, name


def test_a_non_finite_loss_stops_the_training():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="update 0"):
        fit(model, [BATCH], lr=1e-2)


def test_gate():
    gate = HealthGate()
    assert gate.passes(Health(valid_left_sides=0.97, hint_loss=0.09, avg_at_12=0.3))
    assert not gate.passes(Health(valid_left_sides=0.969, hint_loss=0.05, avg_at_12=0.3))
    assert not gate.passes(Health(valid_left_sides=0.99, hint_loss=0.091, avg_at_12=0.3))
    # An unfinished training can be wrong without being wrong in a stable way.
    assert not gate.passes(Health(valid_left_sides=1.0, hint_loss=float("nan"), avg_at_12=0.3))


def test_an_unhealthy_base_is_refused(tmp_path, capsys):
    out = tmp_path / "base"
    assert pretrain.main(["--out", str(out), "--steps", "2", "--max-seeds", "2"]) == 1
    assert not out.exists()
    captured = capsys.readouterr()
    assert captured.out.count("FAILS the gate") == 2
    assert "no seed of 2 passed" in captured.err


def test_a_passing_base_is_a_hugging_face_folder(tmp_path):
    out = tmp_path / "base"
    anything = HealthGate(min_valid_left_sides=0.0, max_hint_loss=100.0)
    assert pretrain.pretrain(out, Recipe(seed=5, steps=3), anything, max_seeds=1)
    record = json.loads((out / "pretrain.json").read_text())
    assert record["recipe"]["seed"] == 5
    assert [tried["seed"] for tried in record["tried"]] == [5]
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == model.config.vocab_size
    # The same recipe gives the same weights.
    again, _, _ = pretrain.train_base(Recipe(seed=5, steps=3))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
