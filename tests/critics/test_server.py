"""The server critic against a server that fails in twelve ways: nothing made up, all counted."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import signal
import threading
import time
import tracemalloc
from collections import Counter

import pytest
from fault_server import FAULTS, MODEL, RETRY_AFTER_S, WRONG_STEPS, FaultServer, completion
from server_critics import ask, first, named, writer

from fastsd.critics.server import _pause
from fastsd.critics.writer import WriterUnavailable
from fastsd.errors import Interrupted
from fastsd.runtime.signals import SignalGate
from fastsd.serving.cache import Reply
from fastsd.serving.endpoint import _retry_after

# -- twelve classes of faults ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_becomes_feedback(fault, count, caplog):
    """Faulty and good requests in turn: good replies come as sent, in their places; a fault is
    text=None under its own class, or the reply as sent where the reply itself is the fault."""
    texts = [f"{fault} {i}" if i % 2 else f"good {i}" for i in range(2 * count)]
    timeout_s = 0.6 if FAULTS[fault] == "timeout" else 10.0
    with FaultServer(named(fault)) as server:
        replies = writer(server.url, timeout_s=timeout_s, retries=0, concurrency=1).write(
            ask(texts)
        )
    assert replies[::2] == [Reply(f"reply to {text}") for text in texts[::2]]
    sent = {"empty": "", "wrong_steps": WRONG_STEPS}
    expected = Reply(sent.get(fault), failure=FAULTS[fault])
    assert replies[1::2] == [expected] * count
    if FAULTS[fault]:
        assert Counter(reply.failure for reply in replies)[FAULTS[fault]] == count
        assert f"of {2 * count} replies {count} {FAULTS[fault]}" in caplog.text


IN_TRANSIT = ["5xx", "429", "timeout", "reset", "half_body", "drip"]


@pytest.mark.parametrize("fault", IN_TRANSIT)
def test_a_transient_fault_is_overcome(fault):
    timeout_s = 0.6 if FAULTS[fault] == "timeout" else 10.0
    with FaultServer(first(fault, 1)) as server:
        replies = writer(server.url, timeout_s=timeout_s, retries=1).write(ask("ab"))
        assert replies == [Reply("reply to a"), Reply("reply to b")]
        assert server.asked == {"a": 2, "b": 2}


@pytest.mark.parametrize("fault", [*(f for f in FAULTS if f not in IN_TRANSIT), "400", "gzip"])
def test_a_reply_that_would_come_again_is_not_asked_for_again(fault):
    with FaultServer(first(fault, 9)) as server:
        [reply] = writer(server.url, retries=2).write(ask("a"))
        assert server.asked == {"a": 1}
    assert reply.failure == {"400": "client_error", "gzip": "bad_reply"}.get(
        fault, FAULTS.get(fault)
    )


def test_attempts_end(caplog):
    with FaultServer(first("5xx", 9)) as server:
        [reply] = writer(server.url, retries=2).write(ask("a"))
        assert server.asked == {"a": 3}
    assert reply == Reply(None, failure="server_error")
    assert "503 overloaded" in caplog.text


@pytest.mark.parametrize("fault", ["10_mb", "10_mb_error", "gzip"])
def test_a_huge_body_stays_out_of_memory(fault):
    with FaultServer(named(fault)) as server:
        one = writer(server.url, retries=0, concurrency=2)
        one.write(ask("ab"))  # whatever is imported or built once
        tracemalloc.start()
        try:
            replies = one.write(ask([f"{fault} {i}" for i in range(2)]))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    failure = "server_error" if fault == "10_mb_error" else "bad_reply"
    assert [reply.failure for reply in replies] == [failure] * 2
    assert peak < 8_000_000


NOT_REPLIES = {
    "list": b"[]",
    "no choice": b'{"choices": []}',
    "no message": b'{"choices": [{"finish_reason": "stop"}]}',
    "no content": b'{"choices": [{"message": {}, "finish_reason": "stop"}]}',
    "no reason": b'{"choices": [{"message": {"content": "x"}}]}',
    "number": completion(44),
    "odd reason": completion("x", finish_reason={}),
    "half a character": completion("?").replace(b"?", rb"\ud83d"),
    "deep": b"[" * 100_000,
    "long number": b"1" * 100_000,
    "nothing": b"",
    "utf-16": completion("x").decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", NOT_REPLIES)
def test_other_shapes_are_bad_replies(name):
    with FaultServer(answer=lambda text: NOT_REPLIES[name]) as server:
        assert writer(server.url).write(ask("a")) == [Reply(None, failure="bad_reply")]


def test_replies_that_say_little():
    """A reply of nothing is a reply; one that was cut says so."""
    bodies = {"null": completion(None, "length"), "cut": completion("x", "length")}
    bodies["odd"] = completion("\x00<|im_end|>\u202e😀", None)
    with FaultServer(answer=bodies.__getitem__) as server:
        assert writer(server.url).write(ask(["null", "cut", "odd"])) == [
            Reply("", truncated=True),
            Reply("x", truncated=True),
            Reply("\x00<|im_end|>\u202e😀"),
        ]


# -- what is asked --------------------------------------------------------------------------------


def test_what_is_sent():
    with FaultServer() as server:
        writer(server.url, max_tokens=77).write(ask("a"))
        kwargs = {"enable_thinking": True}
        writer(server.url, template_kwargs=kwargs).write(ask("b"))
        plain, thinking = server.requests
    assert plain == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.0,
        "max_tokens": 77,
    }
    assert thinking["chat_template_kwargs"] == kwargs


def test_what_decides_the_text_is_the_identity():
    with FaultServer() as server, FaultServer() as other:
        one = writer(server.url, timeout_s=1, retries=9, concurrency=3, api_key_env="X")
        assert one.identity == writer(other.url).identity
        json.dumps(one.identity)
        for change in ({"model": "b"}, {"max_tokens": 5}, {"template_kwargs": {"a": 1}}):
            assert writer(server.url, **change).identity != one.identity
        assert MODEL in one.name and server.url in one.name
    assert one.write([]) == []


def test_no_more_at_once_than_allowed():
    with FaultServer(delay_s=0.1) as server:
        replies = writer(server.url, concurrency=4).write(ask(map(str, range(20))))
        assert server.most_at_once == 4
    assert [reply.text for reply in replies] == [f"reply to {i}" for i in range(20)]


# -- time -----------------------------------------------------------------------------------------


def test_what_is_not_there_within_the_budget_is_over_budget(caplog):
    with FaultServer(named("timeout")) as server:
        start = time.monotonic()
        texts = ["a", "timeout", "b", "c"]
        replies = writer(server.url, concurrency=1, budget_s=1.0).write(ask(texts))
        assert time.monotonic() - start < 4
    late = Reply(None, failure="over_budget")
    assert replies == [Reply("reply to a"), late, late, late]
    assert "3 over_budget" in caplog.text


def test_a_batch_wholly_over_budget_is_a_dead_critic():
    with FaultServer(delay_s=5) as server:
        with pytest.raises(WriterUnavailable, match="critic.budget_s = 0.5") as stop:
            writer(server.url, budget_s=0.5).write(ask("ab"))
    assert stop.value.partial == {}


def test_retry_after_is_waited_for():
    with FaultServer(first("429", 1)) as server:
        assert writer(server.url).write(ask("a")) == [Reply("reply to a")]
        early, late = server.times["a"]
    assert late - early >= RETRY_AFTER_S


def test_a_wait_beyond_the_budget_is_not_begun():
    with FaultServer(first("429_for_an_hour", 1)) as server:
        start = time.monotonic()
        replies = writer(server.url).write(ask("a"))
        assert time.monotonic() - start < 5
        assert server.asked == {"a": 1}
    assert replies == [Reply(None, failure="rate_limited")]


def test_forms_of_retry_after():
    assert _retry_after("2.5") == 2.5
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < _retry_after(date) <= 60
    odd = ("", "soon", "-3", "nan", "inf", "1e999", "Mon, 99 Foo 2020 00:00:00 GMT", "9" * 5000)
    assert [_retry_after(value) for value in odd] == [0.0] * len(odd)


def test_pauses_double_and_spread(monkeypatch):
    monkeypatch.undo()
    assert all(0.25 <= _pause(0, i) <= 0.5 and 1 <= _pause(2, i) <= 2 for i in range(50))
    assert all(4 <= _pause(30, i) <= 8 for i in range(50))
    assert len({_pause(0, i) for i in range(50)}) > 40
    assert _pause(1, 7) == _pause(1, 7)


def test_a_signal_is_not_kept_waiting():
    with FaultServer(named("timeout")) as server, SignalGate():
        timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        start = time.monotonic()
        with pytest.raises(Interrupted):
            writer(server.url).write(ask(["timeout"]))
        assert time.monotonic() - start < 3
        timer.join()


def test_it_works_beside_a_running_loop():
    with FaultServer() as server:

        async def in_a_notebook():
            return writer(server.url).write(ask("a"))

        assert asyncio.run(in_a_notebook()) == [Reply("reply to a")]
