"""The supervised loop, the health gate, and a base trained for a moment."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastsd import pretrain as command
from fastsd.errors import TrainingDiverged
from fastsd.pretraining import base as pretrain
from fastsd.pretraining.base import Health, HealthGate, Recipe, completion_loss, fit
from fastsd.pretraining.chain_sum_author import Author
from fastsd.tasks.chain_sum import STEP, ChainSum, base_path

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
    mask = torch.tensor(
        [[1] * (len(p) + len(c)) + [0] * (length - len(p) - len(c)) for p, c in BATCH]
    )
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
        optimizer.zero_grad()
        loss.backward()
        # Rounding of the loss, and what weights that differ as below move it: |dL| <= |g| |dw|.
        moves = sum(
            (p.grad.abs() * (1e-6 + 1e-5 * p.abs())).sum().item() for p in theirs.parameters()
        )
        assert seen[update] == (update + 1, pytest.approx(loss.item(), rel=1e-6, abs=moves))
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
    with pytest.raises(TrainingDiverged, match="update 0"):
        fit(model, [BATCH], lr=1e-2)


def test_gate():
    gate = HealthGate()
    assert gate.passes(Health(valid_left_sides=0.97, hint_loss=0.09, avg_at_12=0.3))
    assert not gate.passes(Health(valid_left_sides=0.969, hint_loss=0.05, avg_at_12=0.3))
    assert not gate.passes(Health(valid_left_sides=0.99, hint_loss=0.091, avg_at_12=0.3))
    # An unfinished training can be wrong without being wrong in a stable way.
    assert not gate.passes(Health(valid_left_sides=1.0, hint_loss=float("nan"), avg_at_12=0.3))


@pytest.fixture
def quick_measure(monkeypatch):
    """Health on fewer samples: a base of no skill never stops writing, which takes its time."""
    quick = functools.partial(pretrain.measure, questions=4, samples=2)
    monkeypatch.setattr(pretrain, "measure", quick)


@pytest.mark.usefixtures("quick_measure")
def test_an_unhealthy_base_is_refused(tmp_path, capsys):
    out = tmp_path / "base"
    assert command.main(["chain_sum", "--out", str(out), "--steps", "1", "--max-seeds", "2"]) == 1
    assert not out.exists()
    captured = capsys.readouterr()
    assert captured.out.count("FAILS the gate") == 2
    assert "no seed of 2 passed" in captured.err


@pytest.mark.usefixtures("quick_measure")
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


@pytest.fixture(scope="module")
def shipped():
    folder = base_path()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_the_shipped_base_is_small_and_complete():
    files = {path.name: path for path in base_path().iterdir()}
    assert sum(path.stat().st_size for path in files.values()) <= 1.5e6
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= {
        *files
    }
    assert all(name.endswith((".safetensors", ".json", ".jinja")) for name in files)


def test_the_shipped_base_is_what_its_record_says(shipped):
    """The recorded recipe is the default one, and the recorded health is measured again here."""
    model, tokenizer = shipped
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    record = json.loads((base_path() / "pretrain.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    health = pretrain.measure(model, tokenizer, Author(Recipe().seed))
    assert HealthGate().passes(health)
    recorded = record["tried"][-1]
    # Sampling may part ways on another processor: three standard errors of 1,536 samples.
    assert health.avg_at_12 == pytest.approx(recorded["avg_at_12"], abs=0.04)
    assert health.hint_loss == pytest.approx(recorded["hint_loss"], rel=1e-3)


def test_the_shipped_base_writes_steps(shipped):
    """Greedy responses to unseen questions have the form of the task and stop on their own."""
    model, tokenizer = shipped
    task = ChainSum()
    asked = [task.prompt("eval", 1000 + i).question for i in range(40)]
    prompts = torch.tensor([tokenizer.encode(f"<q>{question}<a>") for question in asked])
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=24
    )
    responses = tokenizer.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
    formed = [len(response) == 18 and len(STEP.findall(response)) == 3 for response in responses]
    assert sum(formed) >= 38
    # It has wrong beliefs, so some answers are right and many are not.
    assert 4 <= sum(task.reward(asked, responses)) <= 30


def test_the_shipped_base_uses_hints(shipped):
    """Shown a critique of its own attempt, it puts more probability on the corrected values."""
    model, tokenizer = shipped
    asked = [ChainSum().prompt("eval", 1000 + i) for i in range(40)]
    right = [
        (prompt.question, ChainSum(reference_phrasing="own").reference(prompt.question))
        for prompt in asked
    ]
    hinted = [(f"{question}H{solution}", solution) for question, solution in right]
    with torch.no_grad():
        without = completion_loss(model, pretrain.encode(tokenizer, right))
        shown = completion_loss(model, pretrain.encode(tokenizer, hinted))
    assert shown < without / 3
