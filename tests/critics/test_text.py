"""Prompt, cache, writer, stripping and validation together: asked once, kept, never made up."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastsd.config import Config
from fastsd.config.sections import CriticConfig
from fastsd.critics import open_critic
from fastsd.critics.text import TextCritic
from fastsd.critics.writer import WriterUnavailable
from fastsd.errors import CheckpointError, CriticUnavailable
from fastsd.rewards.functions import exact_reward
from fastsd.serving.cache import Reply, ReplyCache
from fastsd.types import Prompt, Rollout

GOOD = "Step 1: 1+2=3\nAnswer: 3"


def rollout_of(index: int, text: str = "Step 1: 1+2=4\nAnswer: 4", reward=0.0) -> Rollout:
    prompt = Prompt(f"p{index}", ({"role": "user", "content": f"Q{index}"},), answer="3")
    return Rollout(prompt, 0, (1,), (0.0,), text, False, reward)


class Scripted:
    """Answers by the question's name; counts what it is asked."""

    name = "scripted"

    def __init__(self, replies: dict[str, Reply] | None = None, identity: dict | None = None):
        self.replies = replies or {}
        self.identity = identity or {"kind": "scripted", "model": "m"}
        self.asked: list[str] = []

    def write(self, conversations):
        names = [question(conversation) for conversation in conversations]
        self.asked += names
        return [self.replies.get(name, Reply(GOOD)) for name in names]


def question(conversation) -> str:
    return next(line for line in conversation[-1]["content"].splitlines() if line.startswith("Q"))


def critic_of(writer, folder: Path, reward=exact_reward, **config) -> TextCritic:
    return TextCritic(writer, CriticConfig(**config), folder, reward, None)


def problems(critiques) -> list[str | None]:
    assert all((c.text is None) == (c.problem is not None) for c in critiques)
    return [critique.problem for critique in critiques]


def test_replies_become_critiques_in_order(tmp_path):
    writer = Scripted(
        {
            "Q0": Reply(f"<think>Answer: 9</think>\n{GOOD}"),
            "Q1": Reply(None, failure="timeout"),
            "Q2": Reply(GOOD, truncated=True),
            "Q3": Reply("<think>endless"),
            "Q4": Reply("Step 1: 1+2=5\nAnswer: 5"),
            "Q5": Reply("Answer: 3"),
            "Q6": Reply(None),
        }
    )
    critiques = critic_of(writer, tmp_path).critique([rollout_of(i) for i in range(8)])
    assert problems(critiques) == [
        *(None, "timeout", "too_long", "empty", "wrong_answer", "unparsed", "no_reply", None)
    ]
    assert critiques[0].text == critiques[7].text == GOOD


def test_each_conversation_is_asked_once(tmp_path):
    writer = Scripted()
    critic = critic_of(writer, tmp_path)
    rollouts = [rollout_of(0), rollout_of(1), rollout_of(0), rollout_of(0, "Step 1: 2\nAnswer: 3")]
    first = critic.critique(rollouts)
    assert writer.asked == ["Q0", "Q1", "Q0"]
    again = Scripted()
    assert critic_of(again, tmp_path).critique(rollouts) == first
    assert again.asked == []


def test_only_what_arrived_is_kept(tmp_path):
    failed = {"Q1": Reply(None, failure="server_error"), "Q3": Reply(GOOD, failure="bad_reply")}
    writer = Scripted({**failed, "Q2": Reply("", truncated=True)})
    rollouts = [rollout_of(i) for i in range(4)]
    found = problems(critic_of(writer, tmp_path).critique(rollouts))
    assert found == [None, "server_error", "too_long", "bad_reply"]
    assert len(list(tmp_path.rglob("*.json"))) == 2
    later = Scripted()
    found = problems(critic_of(later, tmp_path).critique(rollouts))
    assert found == [None, None, "too_long", None] and later.asked == ["Q1", "Q3"]


def test_a_writer_that_dies_leaves_what_had_arrived(tmp_path):
    class Dying(Scripted):
        def write(self, conversations):
            raise WriterUnavailable("gone", {1: Reply(GOOD), 2: Reply(None, failure="timeout")})

    rollouts = [rollout_of(i) for i in range(3)]
    with pytest.raises(CriticUnavailable) as caught:
        critic_of(Dying(), tmp_path).critique(rollouts)
    assert caught.value.exit_code == 3
    later = Scripted()
    critic_of(later, tmp_path).critique(rollouts)
    assert later.asked == ["Q0", "Q2"]


@pytest.mark.parametrize(
    "identity", [{"kind": "scripted", "model": "other"}, {"kind": "scripted", "temperature": 0}]
)
def test_another_writer_is_asked_anew(identity, tmp_path):
    critic_of(Scripted(), tmp_path).critique([rollout_of(0)])
    other = Scripted(identity=identity)
    critic_of(other, tmp_path).critique([rollout_of(0)])
    assert other.asked == ["Q0"]


def test_settings_that_change_the_request_ask_anew_and_others_do_not(tmp_path):
    critic_of(Scripted(), tmp_path).critique([rollout_of(0)])
    for config, asked in (
        ({"min_verbatim": 1.0, "on_invalid": "drop_group", "concurrency": 3}, []),
        ({"quoting": "full"}, ["Q0"]),
        ({"sees": "answer"}, ["Q0"]),
    ):
        writer = Scripted()
        critic_of(writer, tmp_path, **config).critique([rollout_of(0)])
        assert writer.asked == asked


def kept_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.json")
    return path


def damage(path: Path, how: str) -> None:
    record = json.loads(path.read_text())
    if how == "text":
        record["reply"]["text"] = "Step 1: 1+2=3\nAnswer: 3 "
    elif how == "request":
        record["request"]["identity"]["model"] = "other"
    elif how == "type":
        record["reply"]["text"] = 3
    texts = {"cut": path.read_text()[:-9], "list": "[]", "bytes": "\xff"}
    path.write_bytes(texts.get(how, json.dumps(record)).encode("latin-1"))


@pytest.mark.parametrize("how", ["text", "request", "type", "cut", "list", "bytes"])
def test_a_broken_file_is_passed_over_with_one_line(how, tmp_path, caplog):
    critic_of(Scripted(), tmp_path).critique([rollout_of(0)])
    damage(kept_file(tmp_path), how)
    writer = Scripted()
    with caplog.at_level(logging.WARNING):
        critiques = critic_of(writer, tmp_path).critique([rollout_of(0)])
    assert problems(critiques) == [None] and writer.asked == ["Q0"]
    (record,) = caplog.records
    assert str(kept_file(tmp_path)) in record.getMessage() and "asked again" in record.getMessage()
    writer.asked.clear()
    critic_of(writer, tmp_path).critique([rollout_of(0)])
    assert writer.asked == []


def test_one_flipped_bit_never_changes_a_reply(tmp_path):
    cache, conversation = ReplyCache(tmp_path), [{"role": "user", "content": "x"}]
    cache.write({}, conversation, Reply(GOOD))
    path, key = kept_file(tmp_path), cache.key({}, conversation)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        assert cache.read(key) in (None, Reply(GOOD))


def test_no_text_decides_a_path_and_any_text_comes_back(tmp_path):
    texts = ["../../x", "\x00", "\ud800", "a/b\\c", "{}", "\u2028" * 3, "é" * 1000]
    cache = ReplyCache(tmp_path / "cache")
    for text in texts:
        conversation = [{"role": text, "content": text}]
        cache.write({text: text}, conversation, Reply(text, truncated=True))
        assert cache.read(cache.key({text: text}, conversation)) == Reply(text, True)
    for path in tmp_path.rglob("*.*"):
        folder, name = path.relative_to(tmp_path / "cache").parts
        assert path.suffix == ".json" and len(path.stem) == 64 and name.startswith(folder)


def test_threads_may_write_the_same_reply(tmp_path):
    cache, conversation = ReplyCache(tmp_path), [{"role": "user", "content": "x"}]
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(
            lambda _: cache.write({}, conversation, Reply("a" * 50_000)), range(100)
        ):
            pass
    assert cache.read(cache.key({}, conversation)) == Reply("a" * 50_000)
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".json"]


def test_a_folder_that_takes_nothing_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="critic.cache") as caught:
        critic_of(Scripted(), tmp_path / "file").critique([rollout_of(0)])
    assert caught.value.exit_code == 5


def test_the_critic_solves_the_question_alone(tmp_path):
    class Solver(Scripted):
        def write(self, conversations):
            self.asked += [turns[-1]["content"] for turns in conversations]
            return [Reply("<think>x</think>Answer: 3"), Reply("y", True), Reply(None, False, "z")]

    writer = Solver()
    prompts = [rollout_of(i).prompt for i in range(3)]
    assert critic_of(writer, tmp_path).solve(prompts) == ["Answer: 3", None, None]
    assert writer.asked == ["Q0", "Q1", "Q2"]


def test_open_critic_chooses_by_kind_and_puts_the_cache_into_the_run(tmp_path, monkeypatch):
    import fastsd.critics as critics

    assert open_critic(Config(condition="grpo"), None, tmp_path) is None
    monkeypatch.setattr(critics, "_open_writer", lambda config: Scripted())
    settings = {"kind": "local", "model": "m"}
    critic = open_critic(Config(critic=settings), None, tmp_path / "run", reward=exact_reward)
    assert isinstance(critic, TextCritic) and critic.reward is exact_reward
    critic.critique([rollout_of(0)])
    assert kept_file(tmp_path / "run" / "critiques")
    shared = str(tmp_path / "shared")
    critic = open_critic(Config(critic={**settings, "cache": shared}), None, tmp_path / "run")
    assert isinstance(critic, TextCritic)
    critic.critique([rollout_of(0)])
    assert kept_file(tmp_path / "shared")
