"""A critic that dies: found out within three failures, checkpoint, exit 3, resumed elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from fault_server import FAULTS, MODEL, FaultServer
from places import ROOT
from server_critics import ask, writer
from small_runs import losses
from tiny_models import build_tiny_llama

from fastsd.checkpoint import checkpoints
from fastsd.config import load_config
from fastsd.config.sections import CriticConfig
from fastsd.critics.server import ServerWriter
from fastsd.critics.text import TextCritic
from fastsd.critics.writer import WriterUnavailable
from fastsd.records.folder import read_metrics
from fastsd.serving.cache import Reply
from fastsd.train import main
from fastsd.types import Prompt, Rollout

KEY = "sk-planted-51ab"


# -- three in a row -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["5xx", "429", "timeout", "reset", "half_body"])
def test_three_failures_in_a_row_are_a_death(fault):
    with FaultServer(lambda text, attempt: fault if text != "a" else None) as server:
        one = writer(server.url, retries=1, concurrency=1, timeout_s=0.3)
        with pytest.raises(WriterUnavailable, match="3 requests in a row") as stop:
            one.write(ask("abcdefgh"))
        assert server.asked == {"a": 1, "b": 2, "c": 2, "d": 2}
    assert stop.value.exit_code == 3
    assert stop.value.partial == {0: Reply("reply to a")}
    message = str(stop.value)
    assert all(words in message for words in (server.url, MODEL, "--resume auto", FAULTS[fault]))


def test_a_reply_in_between_is_a_sign_of_life():
    bad = {"b", "c", "e", "f", "h"}
    with FaultServer(lambda text, attempt: "5xx" if text in bad else None) as server:
        replies = writer(server.url, retries=0, concurrency=1).write(ask("abcdefgh"))
    assert [reply.failure is None for reply in replies] == [text not in bad for text in "abcdefgh"]


def test_failures_in_a_row_are_counted_across_batches():
    with FaultServer(lambda text, attempt: "reset") as server:
        one = writer(server.url, retries=0)
        assert one.write(ask("ab")) == [Reply(None, failure="connection")] * 2
        with pytest.raises(WriterUnavailable):
            one.write(ask("c"))


def test_requests_that_are_wrong_do_not_kill_the_server():
    with FaultServer(lambda text, attempt: "400") as server:
        replies = writer(server.url).write(ask("abcde"))
    assert replies == [Reply(None, failure="client_error")] * 5


@pytest.mark.parametrize(
    ("fault", "advice"), [("401", "OPENAI_API_KEY"), ("404", "/v1"), ("redirect", "critic.url")]
)
def test_a_refusal_stops_at_once(fault, advice):
    with FaultServer(lambda text, attempt: fault if text != "a" else None) as server:
        with pytest.raises(WriterUnavailable, match=advice) as stop:
            writer(server.url, concurrency=1).write(ask("abcd"))
        assert server.asked == {"a": 1, "b": 1}
    assert stop.value.partial == {0: Reply("reply to a")}


def test_what_arrived_before_the_death_is_not_asked_again(tmp_path):
    rollouts = [
        Rollout(
            Prompt(str(i), ({"role": "user", "content": f"Q{i}"},)), 0, (1,), (0.0,), "x", False
        )
        for i in range(8)
    ]

    def critic(server):
        config = CriticConfig(
            kind="server", url=server.url, model=MODEL, quoting="none", concurrency=1, retries=0
        )
        return TextCritic(ServerWriter(config), config, tmp_path, None, None)

    def number(text) -> int:
        return int(re.search(r"^Q(\d)$", text, re.MULTILINE)[1])

    def answer(text) -> str:
        return f"on {number(text)}"

    with FaultServer(lambda t, attempt: "reset" if number(t) >= 3 else None, answer) as server:
        with pytest.raises(WriterUnavailable):
            critic(server).critique(rollouts)
    with FaultServer(answer=answer) as server:
        critiques = critic(server).critique(rollouts)
        assert sorted(number(text) for text in server.asked) == [3, 4, 5, 6, 7]
    assert [c.text for c in critiques] == [f"on {i}" for i in range(8)]


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"question": f"Say {i}", "answer": str(i), "solution": "s"} for i in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.toml"
    path.write_text(
        f"""
condition = "critique"
[model]
name = "{build_tiny_llama(folder / "model")}"
dtype = "float32"
[data]
train = "{folder / "rows.jsonl"}"
eval = "{folder / "rows.jsonl"}"
[rollout]
prompts_per_step = 3
samples_per_prompt = 2
max_new_tokens = 12
[critic]
kind = "server"
model = "{MODEL}"
quoting = "none"
[reward]
function = "exact"
[optim]
steps = 4
lr = 1e-3
[eval]
questions = 2
samples = 2
[report]
questions = 0
[checkpoint]
every = 0
"""
    )
    return path


def comment(text: str) -> str:
    """A valid critique of an attempt at "Say N", different for each attempt."""
    number = re.search(r"^Say (\d+)$", text, re.MULTILINE)[1]
    return f"Remark {zlib.crc32(text.encode())}.\nAnswer: {number}"


def command(settings: Path, run: Path, server: FaultServer, *more: str) -> list[str]:
    return [str(settings), "--run", str(run), "--critic.url", server.url, *more]


def run_command(arguments: list[str]) -> subprocess.CompletedProcess:
    """As a user has it: a key, and a proxy that must not be asked for a server on this machine."""
    environment = os.environ | {
        "OPENAI_API_KEY": KEY,
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    return subprocess.run(
        [sys.executable, "-m", "fastsd.train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


class Mortal(FaultServer):
    """Dies with its n-th critique."""

    def __init__(self, lives: int):
        super().__init__(fault=self.count, answer=comment)
        self.lives, self.died = lives, 0.0

    def count(self, text: str, attempt: int) -> None:
        if self.asked.total() >= self.lives:
            self.died = self.died or time.monotonic()
            threading.Thread(target=self.close).start()
            self.closing.wait()


def test_a_run_survives_the_death_of_its_critic(settings, tmp_path):
    run = tmp_path / "run"
    child = run / "critique-seed0"
    with Mortal(lives=15) as server:  # 6 critiques a step: in the third
        ended = run_command(command(settings, run, server))
        seconds = time.monotonic() - server.died
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    print(f"{seconds:.1f} s from the critic's death to the end of the process")
    assert ended.returncode == 3, ended.stderr
    assert (run / "report.html").exists(), "a run that ends early has its page too"
    assert server.died and seconds < 10
    error = ended.stderr.splitlines()[-1]
    assert error.startswith("error: critic") and "Traceback" not in ended.stderr
    assert server.url in error and MODEL in error and "--resume auto" in error
    assert [step for step, _ in checkpoints(child)] == [2]
    before = losses(child)
    assert [step for step, _ in before] == [1, 2]

    with FaultServer(answer=comment) as living:
        assert main(command(settings, run, living, "--resume", "auto")) == 0
        # What came before the death is in the cache: two steps, and some of the third.
        assert 24 - 17 <= living.asked.total() <= 24 - 12
        assert main(command(settings, tmp_path / "whole", living)) == 0
    assert losses(child)[:2] == before
    assert losses(child) == losses(tmp_path / "whole" / "critique-seed0")
    assert len({loss for _, loss in losses(child)}) == 4
    assert all(m["feedback/missing_share"] == 0 for m in read_metrics(child))
    places = [path for path in run.rglob("*") if path.is_file()]
    assert len(places) > 20
    assert all(KEY.encode() not in path.read_bytes() for path in places)
    assert KEY not in ended.stdout + ended.stderr


def test_a_critic_that_is_not_there_stops_the_run_before_it_begins(settings, tmp_path, capsys):
    with FaultServer() as server:
        pass
    run = tmp_path / "run"
    assert main(command(settings, run, server)) == 3
    assert "--resume auto" in capsys.readouterr().err
    assert not list(run.rglob("checkpoint-*"))


def test_a_run_counts_each_class_of_failure(settings, tmp_path):
    """One fault of each kind a step: none becomes feedback, each is a metric of its own."""
    faults = ["5xx", "429", "400", "non_json", "empty", None]
    met: dict[str, str | None] = {}

    def fault(text: str, attempt: int) -> str | None:
        return met.setdefault(text, faults[len(met) % 6])

    run = tmp_path / "run"
    more = ["--critic.concurrency", "1", "--critic.retries", "0", "--optim.steps", "2"]
    with FaultServer(fault, comment) as server:
        assert main(command(settings, run, server, *more)) == 0
    classes = {"server_error", "rate_limited", "client_error", "bad_reply", "empty"}
    for metrics in read_metrics(run / "critique-seed0"):
        problems = {k.removeprefix("feedback/problem/"): v for k, v in metrics.items()}
        assert {name: problems[name] for name in classes} == dict.fromkeys(classes, 1.0)
        assert metrics["feedback/dropped_share"] == metrics["feedback/missing_share"] == 5 / 6


def test_resuming_elsewhere_is_allowed_and_another_critic_is_not(settings):
    from fastsd.checkpoint.matches import _FREE_ON_RESUME

    assert {"critic.url", "critic.api_key_env", "critic.timeout_s"} <= set(_FREE_ON_RESUME)
    assert not {"critic", "critic.model", "critic.sees"} & set(_FREE_ON_RESUME)
    assert load_config([str(settings), "--critic.url", "http://b/v1"]).config.critic.url
