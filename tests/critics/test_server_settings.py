"""The server critic's key, address and the check before a run: what cannot work stops early."""

from __future__ import annotations

import sys
import time

import pytest
from fault_server import MODEL, FaultServer
from server_critics import ask, named, writer

from fastsd.critics.writer import WriterUnavailable
from fastsd.errors import FastsdError
from fastsd.serving.cache import Reply

KEY = "sk-planted-8c1f"


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog, capsys):
    monkeypatch.setenv("MY_KEY", KEY + "\n")  # as `export MY_KEY="$(cat file)\n"` leaves it
    with FaultServer(named("401")) as server:
        one = writer(server.url, api_key_env="MY_KEY")
        assert one.write(ask("a")) == [Reply("reply to a")]
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        caplog.set_level("DEBUG")
        with pytest.raises(WriterUnavailable, match="MY_KEY") as stop:  # the server repeats it
            one.write(ask(["401"]))
    output = "".join(capsys.readouterr())
    shown = f"{stop.value} {one!r} {vars(one)} {one.endpoint!r} {one.identity} {one.name}"
    assert "Bad key Bearer ***" in str(stop.value) and "\x1b" not in str(stop.value)
    assert KEY not in shown + caplog.text + output


def test_keys_and_urls_that_cannot_be_used(monkeypatch):
    with FaultServer() as server:
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Evil: 1")
        with pytest.raises(FastsdError, match="OPENAI_API_KEY") as error:
            writer(server.url)
        assert KEY not in str(error.value)
        monkeypatch.setenv("OPENAI_API_KEY", "")
        for url in ("ftp://a/v1", "http://", "127.0.0.1:8000", "http://a b/", "http://a:99999/v1"):
            with pytest.raises(FastsdError, match="critic.url"):
                writer(url)
        with pytest.raises(FastsdError, match="critic.api_key_env") as error:
            writer(f"http://me:{KEY}@127.0.0.1/v1")
        assert KEY not in str(error.value)


def test_a_proxy_is_not_used_for_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with FaultServer() as server:
        assert writer(server.url).write(ask("a")) == [Reply("reply to a")]
        by_name = server.url.replace("127.0.0.1", "localhost")
        assert writer(by_name).write(ask("a")) == [Reply("reply to a")]


def test_without_the_openai_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with FaultServer() as server, pytest.raises(FastsdError) as error:
        writer(server.url)
    assert "pip install 'fastsd[critic]'" in str(error.value)


# -- the check before a run -----------------------------------------------------------------------


def test_a_critic_that_is_there_passes_the_check():
    for models in ((MODEL, "other"), (), 404, 405):
        with FaultServer(models=models) as server:
            writer(server.url).check()
            assert server.asked.total() == (1 if models in (404, 405) else 0)


def test_the_check_names_what_is_served():
    with FaultServer(models=("a", "b\x1b[2J")) as server:
        with pytest.raises(FastsdError, match="critic.model = 'critic'.*serves 'a', 'b") as error:
            writer(server.url).check()
    assert error.value.exit_code == 2 and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("models", "fault", "words"),
    [
        (401, None, "OPENAI_API_KEY"),
        (500, None, "server_error: 500 no list"),
        (404, "404", "usually ends in /v1"),
        (404, "5xx", "503 overloaded"),
        (307, None, "critic.url"),
        (200, None, "bad_reply: it is no list of models.*critic.url"),
    ],
)
def test_the_check_stops_a_run_that_could_not_go_on(models, fault, words):
    with FaultServer(lambda text, attempt: fault, models=models) as server:
        with pytest.raises(WriterUnavailable, match=words) as error:
            writer(server.url, retries=1).check()
    assert error.value.exit_code == 3 and "--resume auto" in str(error.value)


def test_the_check_of_a_server_that_is_not_there():
    with FaultServer() as server:
        pass
    start = time.monotonic()
    with pytest.raises(WriterUnavailable, match="connection"):
        writer(server.url).check()
    assert time.monotonic() - start < 10
