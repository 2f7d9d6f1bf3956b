"""What must not be continued, or cannot be trained, ends every rank with one clear error before a
step: with one process and with two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sharded_run_worker import run_cases
from small_runs import LORA, losses, run_small, small_config
from tiny_models import build_tiny

from fastsd.checkpoint import checkpoints
from fastsd.config import Config
from fastsd.errors import CheckpointError
from fastsd.runtime.world import World
from fastsd.training.session import Session

STEPS = 2


def settings(folder: Path | str, **changes) -> dict:
    """A short run on one of the random models."""
    fixed = {
        "model": {"name": str(folder), **changes.pop("model", {})},
        "optim": {"steps": STEPS, **changes.pop("optim", {})},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6},
        "prompt": {"max_prompt_tokens": 512, "max_feedback_tokens": 512},
        "guard": {"collapse": "off"},
    }
    return small_config("reference", **fixed, **changes).model_dump(mode="json")


# The model that a checkpoint is of, what stands in its place when it is to be continued, and what
# the message names.
OTHER_MODELS = {
    "wider layers": ({}, {"intermediate_size": 48}, "model.layers.0.mlp.gate_proj.weight"),
    "more layers": ({}, {"num_hidden_layers": 3}, "model.layers.2."),
    "fewer layers": ({}, {"num_hidden_layers": 1}, "model.layers.1."),
    "another kind": ({}, {"architecture": "qwen3"}, "self_attn.q_norm.weight"),
    "untied": ({}, {"tie_word_embeddings": False}, "lm_head.weight"),
    # With adapters alone in the optimizer, a model of another vocabulary would do.
    "vocabulary": ({"lora": LORA}, {"vocab_size": 301}, "model.embed_tokens.weight"),
}

# Settings that no run can have, or none of many processes.
FRESH = {
    "head alone": {"freeze": ["embed", "layers", "model.norm"]},
    "adapter on the head": {"lora": {**LORA, "target_modules": ["q_proj", "lm_head"]}},
}


def model(folder: Path, architecture: str = "llama", **changes) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return build_tiny(architecture, folder, **changes)


def damage(checkpoint: Path) -> None:
    [weights] = checkpoint.glob("model*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    plain = model(folder / "plain")
    trees = {
        name: settings(model(folder / name), model=own)
        for name, (own, _, _) in OTHER_MODELS.items()
    }
    trees |= {name: settings(plain) for name in ("damaged", "all damaged", "settings")}
    run_cases(folder, 1, trees)
    for name, (_, other, _) in OTHER_MODELS.items():
        model(folder / name, **other)
    damage(folder / "damaged-1" / f"checkpoint-{STEPS}")
    for _, checkpoint in checkpoints(folder / "all damaged-1"):
        damage(checkpoint)
    trees["settings"] = settings(plain, optim={"lr": 1.0})
    resume = {f"{name} again": (f"{name}-1", STEPS) for name in trees}
    cases = {f"{name} again": tree for name, tree in trees.items()}
    cases |= {name: settings(folder / "untied", model=own) for name, own in FRESH.items()}
    for ranks in (1, 2):
        run_cases(folder, ranks, cases, resume)
    return folder


def errors(run_dir: Path, ranks: int) -> list[dict]:
    return [json.loads((run_dir / f"error-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_checkpoint_of_another_model(folder, name, ranks):
    run_dir, source = folder / f"{name} again-{ranks}", folder / f"{name}-1"
    found = errors(run_dir, ranks)
    for error in found:
        assert error["kind"] == "CheckpointError" and error == found[0]
        assert OTHER_MODELS[name][2] in error["text"]
    assert (run_dir / "metrics.jsonl").read_bytes() == (source / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_checkpoints(folder, ranks):
    before, again = (losses(folder / name) for name in ("damaged-1", f"damaged again-{ranks}"))
    for (_, a), (_, b) in zip(again, before, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for error in errors(folder / f"all damaged again-{ranks}", ranks):
        assert error["kind"] == "CheckpointError"
        assert f"none of the {STEPS} checkpoints" in error["text"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_settings(folder, ranks):
    for error in errors(folder / f"settings again-{ranks}", ranks):
        assert error["kind"] == "CheckpointError" and "[optim] was" in error["text"]


class SecondOfTwo(World):
    """The second of two ranks, the first of which cannot read the disk."""

    def __init__(self):
        super().__init__(rank=1, size=2)

    def gather(self, value):
        return [(None, (CheckpointError, "cannot be read", 0)), value]


def test_a_checkpoint_that_another_rank_cannot_read(tmp_path):
    config = Config(**settings(model(tmp_path / "model"), optim={"steps": 1}))
    run_small(config, tmp_path / "run")
    session = Session(config, tmp_path / "run")
    session.world = SecondOfTwo()
    with pytest.raises(CheckpointError, match="^rank 0: cannot be read$"):
        session.restore()


def test_rollouts_to_questions_that_the_data_has_no_longer(tmp_path):
    def write(name: str) -> None:
        rows = [{"id": f"{name}-{i}", "question": f"{i}+1", "solution": f"{i + 1}"} for i in (1, 2)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    data = tmp_path / "data.jsonl"
    write("before")
    tree = settings(model(tmp_path / "model"), optim={"steps": 1})
    tree["data"] |= {"task": None, "train": str(data), "eval": str(data)}
    tree["reward"]["function"] = "reward_functions:coin"
    tree["rollout"]["steps_per_batch"] = 2
    config = Config(**tree)
    run_small(config, tmp_path / "run")
    Session(config, tmp_path / "run").restore()
    write("after")
    with pytest.raises(CheckpointError, match="question 'before-.'.* no longer"):
        Session(config, tmp_path / "run").restore()


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_adapter_on_the_head_is_refused(folder, ranks):
    run_dir = folder / f"adapter on the head-{ranks}"
    for error in errors(run_dir, ranks):
        assert error["kind"] == "ModelError" and "lm_head" in error["text"]
    assert not (run_dir / "metrics.jsonl").exists()


def test_the_head_alone_is_refused_on_many_ranks(folder):
    assert len(losses(folder / "head alone-1")) == STEPS
    for error in errors(folder / "head alone-2", 2):
        assert error["kind"] == "FastsdError" and "nothing but the head" in error["text"]
    assert not (folder / "head alone-2" / "metrics.jsonl").exists()
