"""Whole runs on rows with a critic of text: what counts, what is counted, what a resume asks."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from small_runs import final_state, losses, run_small
from tiny_models import build_tiny_llama

import fastsd.critics as critics
from fastsd.config import Config
from fastsd.critics.writer import WriterUnavailable
from fastsd.errors import CriticUnavailable
from fastsd.records.completions import read_last_completions
from fastsd.records.folder import read_metrics
from fastsd.serving.cache import Reply


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"question": f"Say {i}", "answer": str(i), "solution": "s"} for i in range(5)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(build_tiny_llama(folder / "model")), "rows": str(path)}


def config_of(files: dict[str, str], steps: int = 1, **sections) -> Config:
    tree = {
        "model": {"name": files["model"], "dtype": "float32"},
        "data": {"train": files["rows"], "eval": files["rows"]},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4, "max_new_tokens": 12},
        "reward": {"function": "exact"},
        "loss": {"policy_weight": 1.0},
        "optim": {"steps": steps, "lr": 1e-3},
        "eval": {"questions": 2, "samples": 1},
        "report": {"questions": 0},
        "checkpoint": {"every": 1, "keep": 50},
    }
    return Config.model_validate({**tree, **sections})


def attempts(run: Path) -> list[tuple[str, str]]:
    rows = read_last_completions(run)
    return [(row["prompt"][-1]["content"], row["completion"][-1]["content"]) for row in rows]


@pytest.fixture(scope="module")
def replayed(files, tmp_path_factory) -> tuple[str, list[tuple[str, str]]]:
    """Critiques of the first step's 8 attempts: number 1 wrong, number 2 missing, 6 valid.

    The first batch of rollouts is the same whatever the condition.
    """
    folder = tmp_path_factory.mktemp("replay")
    config = config_of(files, condition="grpo", loss={})
    seen = attempts(run_small(config, folder / "run"))
    assert len(seen) == 8 == len(set(seen)) and all(response.strip() for _, response in seen)
    rows = []
    for number, (question, response) in enumerate(seen):
        answer = "wrong" if number == 1 else question.removeprefix("Say ")
        critique = f"{response}\n\nAnswer: {answer}"
        rows.append({"question": question, "response": response, "critique": critique})
    del rows[2]
    path = folder / "critiques.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), seen


@pytest.mark.parametrize(
    ("on_invalid", "dropped"),
    [("drop_rollout", [1, 2]), ("drop_group", [0, 1, 2, 3]), ("reward_only", [])],
)
def test_invalid_critiques_drop_what_the_configuration_says(
    on_invalid, dropped, files, replayed, tmp_path
):
    path, seen = replayed
    critic = {"kind": "replay", "file": path, "on_invalid": on_invalid}
    run = run_small(config_of(files, critic=critic), tmp_path / "run")
    (metrics,) = read_metrics(run)
    assert metrics["feedback/problem/wrong_answer"] == 1
    assert metrics["feedback/problem/not_in_file"] == 1
    assert metrics["feedback/dropped_share"] == len(dropped) / 8
    assert metrics["feedback/missing_share"] == 2 / 8
    # Each valid critique repeats its attempt and adds the answer.
    assert metrics["feedback/verbatim_share"] > 0.5
    assert attempts(run) == seen
    shown = [row["critique"] for row in read_last_completions(run)]
    taught = [row["divergence"] is not None for row in read_last_completions(run)]
    assert [i for i, text in enumerate(shown) if text is None] == [1, 2]
    assert taught == [i not in {1, 2, *dropped} for i in range(8)]
    # The critic never sets the reward: no attempt answers right, critiques with the answer do.
    assert metrics["reward/mean"] == 0
    assert {row["reward"] for row in read_last_completions(run)} == {0.0}


def test_a_step_without_any_valid_critique_changes_no_weight(files, tmp_path):
    nothing = {"question": "q", "response": "r", "critique": "c"}
    (tmp_path / "c.jsonl").write_text(json.dumps(nothing) + "\n")
    critic = {"kind": "replay", "file": str(tmp_path / "c.jsonl")}
    run = run_small(config_of(files, critic=critic), tmp_path / "run")
    (metrics,) = read_metrics(run)
    assert metrics["feedback/problem/not_in_file"] == 8 and metrics["feedback/dropped_share"] == 1
    assert metrics["loss"] == 0 and metrics["trained_tokens"] == 0
    model = Path(files["model"]) / "model.safetensors"
    saved = run / "checkpoint-1" / "model.safetensors"
    assert tensors(saved) == tensors(model)


def tensors(path: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


class Counting:
    """A writer whose text depends on what it is asked; dies in one call, one reply delivered."""

    name, identity = "counting", {"kind": "counting"}

    def __init__(self, dies_in_call: int = 0):
        self.asked: list[int] = []
        self.dies_in_call = dies_in_call

    def write(self, conversations):
        self.asked.append(len(conversations))
        if len(self.asked) == self.dies_in_call:
            raise WriterUnavailable("the critic is gone", {0: self._reply(conversations[0])})
        return [self._reply(conversation) for conversation in conversations]

    def _reply(self, conversation) -> Reply:
        digest = hashlib.sha256(json.dumps(conversation).encode()).hexdigest()
        question = next(x for x in conversation[-1]["content"].split("\n") if x.startswith("Say "))
        return Reply(f"<think>{digest}</think>Step {digest[0]}\nAnswer: {question[4:]}")


CRITIC = {"kind": "server", "model": "m", "url": "http://127.0.0.1:1/v1"}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """Three steps with a critic that lives."""
    with pytest.MonkeyPatch.context() as patch:
        writer = Counting()
        patch.setattr(critics, "_open_writer", lambda config: writer)
        folder = tmp_path_factory.mktemp("whole") / "run"
        run_small(config_of(files, steps=3, critic=CRITIC), folder)
    assert writer.asked == [8, 8, 8]
    return folder


def test_a_resumed_run_replays_the_same_feedback(files, whole, monkeypatch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (2, 3):  # a crash before they were saved; the critiques were
        shutil.rmtree(run / f"checkpoint-{step}")
    writer = Counting()
    monkeypatch.setattr(critics, "_open_writer", lambda config: writer)
    run_small(config_of(files, steps=3, critic=CRITIC, resume="auto"), run)
    assert writer.asked == []
    assert final_state(run) == final_state(whole) and losses(run) == losses(whole)


def test_a_critic_that_dies_costs_what_it_had_not_written(files, whole, monkeypatch, tmp_path):
    run, dying = tmp_path / "run", Counting(dies_in_call=3)
    monkeypatch.setattr(critics, "_open_writer", lambda config: dying)
    with pytest.raises(CriticUnavailable):
        run_small(config_of(files, steps=3, critic=CRITIC), run)
    assert (run / "checkpoint-2").is_dir() and not (run / "checkpoint-3").exists()
    living = Counting()
    monkeypatch.setattr(critics, "_open_writer", lambda config: living)
    run_small(config_of(files, steps=3, critic=CRITIC, resume="auto"), run)
    assert living.asked == [7]
    assert final_state(run) == final_state(whole) and losses(run) == losses(whole)
