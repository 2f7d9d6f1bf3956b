"""Servers that fail, hang, or answer nonsense, and servers of other models."""

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch
from fake_vllm import FIXTURES, PROMPTS, open_tiny
from tiny_models import build_tiny, build_tiny_qwen3, load_tiny

import fastsd.rollout.vllm
import fastsd.serving.server
from fastsd.config.sections import PromptConfig, RolloutConfig
from fastsd.errors import Interrupted
from fastsd.prompts.render import PromptRenderer
from fastsd.rollout.vllm import VllmSampler
from fastsd.runtime.signals import SignalGate
from fastsd.serving.server import RolloutError, RolloutUnavailable

folder, policy, serve = FIXTURES


def dies_in_the_middle(path, body):
    return "drop" if path == "/v1/completions" else None


@pytest.mark.parametrize(
    "fault", [dies_in_the_middle, lambda path, body: (503, b"busy"), lambda path, body: (500, {})]
)
def test_a_lost_server_costs_no_group_and_comes_back(policy, serve, tmp_path, fault):
    servers = [serve(), serve()]
    alone = open_tiny(policy, tmp_path / "alone", [serve()]).sample(PROMPTS, 3, key=(1,))
    vllm = open_tiny(policy, tmp_path, servers)
    vllm.update_weights(0)
    servers[1].faults = fault
    assert vllm.sample(PROMPTS, 3, key=(1,)) == alone
    assert vllm.metrics()["rollout/servers"] == 1
    servers[1].faults = lambda path, body: None
    before = len(servers[1].requests)
    vllm.sample(PROMPTS, 3, key=(1,))
    assert len(servers[1].requests) == before, "it has not been given new weights yet"
    vllm.update_weights(1)
    assert vllm.metrics()["rollout/servers"] == 2
    assert vllm.sample(PROMPTS, 3, key=(1,)) == alone


def test_no_server_left_ends_the_run_resumably(policy, serve, tmp_path):
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers)
    vllm.update_weights(0)
    for server in servers:
        server.faults = dies_in_the_middle
    with pytest.raises(RolloutUnavailable, match="no vLLM server is left") as error:
        vllm.sample(PROMPTS, 3, key=(1,))
    assert error.value.exit_code == 3
    assert all(server.url in str(error.value) for server in servers)
    assert "--resume auto" in str(error.value)


def test_a_server_that_answers_nothing_is_lost_in_time(policy, serve, tmp_path):
    server, release = serve(), threading.Event()
    vllm = open_tiny(policy, tmp_path, [server], timeout_s=0.5)
    vllm.update_weights(0)
    server.faults = lambda path, body: release.wait(10) and "drop"
    start = time.monotonic()
    with pytest.raises(RolloutUnavailable, match="no whole reply in"):
        vllm.sample(PROMPTS[:1], 1, key=(1,))
    assert time.monotonic() - start < 5
    release.set()


def test_a_signal_ends_the_wait_at_once(policy, serve, tmp_path):
    server, release, gate = serve(), threading.Event(), SignalGate()
    vllm = open_tiny(policy, tmp_path, [server])
    vllm.update_weights(0)
    server.faults = lambda path, body: release.wait(10) and "drop"
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    with gate, pytest.raises(Interrupted):
        vllm.sample(PROMPTS, 2, key=(1,))
    assert time.monotonic() - start < 3
    release.set()


def test_a_prefix_cache_that_is_still_held_is_asked_again(policy, serve, tmp_path):
    server, answers = serve(), [(200, {"success": False})] * 2
    server.faults = lambda path, body: path == "/reset_prefix_cache" and answers and answers.pop()
    open_tiny(policy, tmp_path, [server]).update_weights(0)
    assert len(server.asked("/reset_prefix_cache")) == 3


def first(reply, **changes):
    reply["choices"][0] |= changes
    return reply


NONSENSE = {
    "not an object": lambda reply: [],
    "no choices": lambda reply: {"choices": []},
    "a choice too few": lambda reply: {"choices": reply["choices"][1:]},
    "another prompt": lambda reply: {
        "choices": [{**choice, "prompt_token_ids": [1]} for choice in reply["choices"]]
    },
    "ids outside": lambda reply: first(reply, token_ids=[10**6] * 12),
    "ids as text": lambda reply: first(reply, token_ids=["a"] * 12),
    "no ids": lambda reply: first(reply, token_ids=[], logprobs={"token_logprobs": []}),
    "a log-prob short": lambda reply: first(reply, logprobs={"token_logprobs": [-1.0]}),
    "not a number": lambda reply: first(
        reply, logprobs={"token_logprobs": [math.nan] * len(reply["choices"][0]["token_ids"])}
    ),
    "logits": lambda reply: first(
        reply, logprobs={"token_logprobs": [3.0] * len(reply["choices"][0]["token_ids"])}
    ),
    "another end": lambda reply: first(reply, finish_reason="abort"),
    "a stop that is none": lambda reply: first(
        reply, finish_reason="stop", token_ids=[0], logprobs={"token_logprobs": [-1.0]}
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_an_error_that_names_the_server(policy, serve, tmp_path, name):
    server = serve()
    vllm = open_tiny(policy, tmp_path, [server])
    vllm.update_weights(0)
    server.change = NONSENSE[name]
    with pytest.raises(RolloutError, match=r"the reply of http://127.*/v1/completions cannot be"):
        vllm.sample(PROMPTS[:1], 2, key=(1,))


@pytest.mark.parametrize(
    "path, answer, message",
    [
        ("/v1/models", (200, b"\xff\xfe"), "is not JSON"),
        ("/v1/models", (200, b"<!doctype html><p>It works"), "<p>It works is not JSON"),
        ("/v1/models", (404, b"<h1>Not Found"), "HTTP 404: <h1>Not Found"),
        ("/v1/models", (200, {"data": []}), "lists no model"),
        ("/v1/models", (200, ["nonsense"]), "lists no model"),
        ("/v1/models", (200, {"data": [{"id": "gpt"}]}), "max_model_len, as vLLM's does"),
        ("/v1/models", (401, b"who are \x1b[31myou"), r"HTTP 401: who are  \[31myou"),
        ("/tokenize", (200, {"tokens": [1, 2]}), "another tokenizer"),
        ("/tokenize", (200, "nonsense"), "another tokenizer"),
        ("/collective_rpc", (404, b""), "VLLM_SERVER_DEV_MODE=1"),
        ("/update_weight_version", (404, b""), "vLLM 0.32 or newer"),
        ("/weight_info", (404, b""), "vLLM 0.32 or newer"),
        ("/weight_info", (200, {"version": 3}), "names no weight_version"),
        ("/reset_prefix_cache", (200, {"success": False}), "keeps the old weights"),
        ("/v1/completions", (400, b"max_tokens"), "HTTP 400: max_tokens"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_at_the_start(
    policy, serve, tmp_path, monkeypatch, path, answer, message
):
    server = serve()
    monkeypatch.setattr(fastsd.serving.server, "RESET_PAUSES_S", (0.01, 0.01))
    server.faults = lambda found, body: answer if found == path else None
    with pytest.raises(RolloutError, match=message) as error:
        open_tiny(policy, tmp_path, [server]).sample(PROMPTS, 1, key=(1,))
    assert error.value.exit_code == 2


def listening(answer: Callable[[socket.socket], None]) -> socket.socket:
    """A port where every connection is answered in that way."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        with contextlib.suppress(OSError):  # it was closed
            while True:
                connection, _ = listener.accept()
                with connection:
                    answer(connection)

    threading.Thread(target=run, daemon=True).start()
    return listener


NO_HTTP = {
    "another protocol": lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "closes at once": lambda connection: None,
    "TLS": lambda connection: connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46"),
    "never answers": lambda connection: time.sleep(5),
}


@pytest.mark.parametrize("what", NO_HTTP)
def test_a_port_of_something_else(policy, tmp_path, monkeypatch, what):
    monkeypatch.setattr(fastsd.serving.server, "SHORT_S", 1.0)
    with listening(NO_HTTP[what]) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        found = "gave no whole reply" if what == "never answers" else "(Read|RemoteProtocol)Error"
        message = f"rollout.servers: not all .* as vLLM does: {url}/v1/models:? .*{found}.*Start"
        start = time.monotonic()
        with pytest.raises(RolloutUnavailable, match=message):
            open_urls(policy, tmp_path, [url])
        assert time.monotonic() - start < 10


def test_https_at_a_server_without_it(policy, serve, tmp_path):
    url = serve().url.replace("http:", "https:")
    with pytest.raises(RolloutUnavailable, match=f"as vLLM does: {url}/v1/models: .*SSL"):
        open_urls(policy, tmp_path, [url])


@pytest.mark.parametrize("other", ["{url}", "{url}/v1/", "http://localhost:{port}"])
def test_the_same_server_twice(policy, serve, tmp_path, other):
    server = serve()
    second = other.format(url=server.url, port=server.server.server_port)
    with pytest.raises(RolloutError, match="rollout.servers: http.* name each server once"):
        open_urls(policy, tmp_path, [server.url, second])


def test_servers_of_other_models_with_our_tokenizer(serve, tmp_path):
    """Another vocabulary cannot take the weights; another rotation takes them, and says others."""
    ours = load_tiny(build_tiny("llama", tmp_path / "ours"), torch.float32)
    larger = serve(folder=build_tiny("llama", tmp_path / "larger", vocab_size=320))
    message = f"{larger.url} cannot load .*: serve the model of model.name, .*size mismatch"
    with pytest.raises(RolloutError, match=message):
        open_tiny(ours, tmp_path, [larger]).update_weights(0)
    rope = {"rope_type": "default", "rope_theta": 50.0}
    turned = serve(folder=build_tiny("llama", tmp_path / "turned", rope_parameters=rope))
    message = rf"{turned.url}: after .* differ from this run's model by \d.*: serve the model of"
    with pytest.raises(RolloutError, match=message):
        open_tiny(ours, tmp_path, [turned]).update_weights(0)


def open_urls(policy, place, urls) -> VllmSampler:
    renderer = PromptRenderer(policy.tokenizer, PromptConfig(max_prompt_tokens=256))
    config = RolloutConfig(engine="vllm", servers=urls, max_new_tokens=12)
    return VllmSampler(policy, renderer, config, place)


def test_opening_finds_wrong_settings_and_servers(policy, serve, tmp_path):
    with pytest.raises(RolloutError, match="start it with --max-model-len 268"):
        open_tiny(policy, tmp_path, [serve(max_model_len=200)])
    other = serve(folder=build_tiny_qwen3(tmp_path / "other", vocab_size=330))
    with pytest.raises(RolloutError, match="another tokenizer"):
        open_tiny(policy, tmp_path, [other])
    gone = serve()
    gone.close()
    with pytest.raises(RolloutUnavailable, match="ConnectError.*Start them"):
        open_tiny(policy, tmp_path, [serve(), gone])
    for url in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(RolloutError, match="rollout.servers: found .*, must be http://HOST:P"):
            open_urls(policy, tmp_path, [url])
    with pytest.raises(RolloutError, match="rollout.servers: empty"):
        open_tiny(policy, tmp_path, [])
