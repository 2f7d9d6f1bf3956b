"""Rollouts from vLLM servers, against one that answers as they do (`fake_vllm`)."""

import json
import math
import os
import signal
import threading
import time

import pytest
import torch
from fake_vllm import FakeVllm
from tiny_models import build_tiny_llama, build_tiny_qwen3

import fastsd.vllm_rollout
import fastsd.vllm_server
from fastsd.config import Config
from fastsd.interrupt import Interrupted, SignalGate
from fastsd.model import load_policy
from fastsd.recorder import Recorder
from fastsd.render import PromptRenderer
from fastsd.rollout import Sampler
from fastsd.run_folder import read_metrics
from fastsd.sections import ModelConfig, PromptConfig, RolloutConfig
from fastsd.train import train
from fastsd.types import Branch, Prompt, TokenTree
from fastsd.vllm_rollout import VllmSampler, open_sampler
from fastsd.vllm_server import RolloutError, RolloutUnavailable
from fastsd_kernels import fused_linear_statistics

QUESTIONS = ["What is 3 + 4?", "Tom has 12 apples.", "x", "Now solve it. <|im_end|>"]
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": q},)) for i, q in enumerate(QUESTIONS)]
LETTERS = list("abcdefghijklmnop")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def policy(folder):
    return load_policy(ModelConfig(name=str(folder)), "cpu", torch.float32)


@pytest.fixture
def serve(folder):
    running = []

    def start(**options):
        running.append(FakeVllm(options.pop("folder", folder), **options))
        return running[-1]

    yield start
    for server in running:
        server.close()


def sampler(policy, folder, servers, **options):
    options = {"max_new_tokens": 12, "stop": LETTERS, **options}
    config = RolloutConfig(engine="vllm", servers=[s.url for s in servers], **options)
    renderer = PromptRenderer(policy.tokenizer, PromptConfig(max_prompt_tokens=256))
    return VllmSampler(policy, renderer, config, folder / "served")


def own_logprobs(policy, renderer, rollout, temperature):
    tree = TokenTree(renderer.student(rollout.prompt), (Branch((), rollout.response_ids),))
    with torch.no_grad():
        hidden_TD = policy.hidden([tree])
    target_T = torch.tensor(rollout.response_ids)
    return fused_linear_statistics(
        hidden_TD, policy.head_VD, target_T, temperature=temperature
    ).student_logprob_T


def change_weights(policy):
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)


def sharpen(policy):
    """A random model is nearly uniform, whatever the temperature: this one is not."""
    with torch.no_grad():
        policy.head_VD.mul_(10)


@pytest.mark.parametrize("temperature, processed", [(1.0, False), (0.7, True)])
def test_a_rollout_is_what_the_policy_would_sample(policy, serve, tmp_path, temperature, processed):
    server = serve(processed=processed)
    vllm = sampler(policy, tmp_path, [server], temperature=temperature)
    rollouts = vllm.sample(PROMPTS, 5, key=(1, 2))
    assert [(r.prompt.id, r.sample) for r in rollouts] == [
        (p.id, sample) for p in PROMPTS for sample in range(5)
    ]
    for rollout in rollouts:
        own_T = own_logprobs(policy, vllm.renderer, rollout, temperature)
        assert rollout.logprobs == pytest.approx(own_T.tolist(), abs=1e-4)
        stopped = rollout.response_ids[-1] in vllm.stop_ids
        assert rollout.truncated != stopped
        ids = rollout.response_ids[:-1] if stopped else rollout.response_ids
        assert rollout.text == policy.tokenizer.decode(ids, skip_special_tokens=True)
    assert {r.truncated for r in rollouts} == {True, False}
    assert len({r.response_ids for r in rollouts}) > 15, "samples of a group must differ"


def test_one_request_per_group_with_our_ids_and_settings(policy, serve, tmp_path):
    server = serve()
    vllm = sampler(policy, tmp_path, [server], top_k=7, top_p=0.9)
    vllm.sample(PROMPTS, 3, key=(1, 2))
    bodies = server.asked("/v1/completions")[1:]  # the first is the probe
    assert sorted(body["prompt"] for body in bodies) == sorted(
        list(vllm.renderer.student(prompt)) for prompt in PROMPTS
    )
    for body in bodies:
        assert (body["n"], body["top_k"], body["top_p"], body["temperature"]) == (3, 7, 0.9, 1.0)
        assert set(body["stop_token_ids"]) == vllm.stop_ids and body["ignore_eos"]
        assert body["repetition_penalty"] == 1.0 and body["min_p"] == 0.0
    assert len({body["seed"] for body in bodies}) == len(PROMPTS)
    assert all(0 <= body["seed"] < 2**62 for body in bodies)


def test_the_key_names_the_draw(policy, serve, tmp_path):
    vllm = sampler(policy, tmp_path, [serve()])
    first = vllm.sample(PROMPTS, 2, key=(1, 2))
    assert vllm.sample(PROMPTS, 2, key=(1, 2)) == first
    assert vllm.sample(PROMPTS, 2, key=(1, 3)) != first
    twice = vllm.sample([PROMPTS[0]] * 2, 2, key=(1, 2))
    assert twice[0].response_ids != twice[2].response_ids
    assert vllm.sample([], 2, key=(1,)) == []


def test_a_draw_at_another_temperature_has_no_log_probs(policy, serve, tmp_path):
    vllm = sampler(policy, tmp_path, [serve()])
    [rollout] = vllm.sample(PROMPTS[:1], 1, key=(1,), temperature=0.5)
    assert rollout.logprobs and all(map(math.isnan, rollout.logprobs))


def test_servers_get_the_weights_of_each_version_once(policy, serve, tmp_path):
    servers = [serve(), serve()]
    vllm = sampler(policy, tmp_path, servers)
    for version in (0, 0, 1, 1, 2):
        vllm.update_weights(version)
        change_weights(policy)
    for server in servers:
        paths = [body["kwargs"]["weights_path"] for body in server.asked("/collective_rpc")]
        assert [path.rpartition("-")[2] for path in paths] == ["0", "1", "2"]
        assert len(server.asked("/reset_prefix_cache")) == 3
    kept = [path.name for path in (tmp_path / "served").iterdir()]
    assert kept == ["weights-2"], "the last version only, and nothing temporary"
    vllm.update_weights(3)
    rollouts = vllm.sample(PROMPTS, 2, key=(1,))
    for rollout in rollouts:
        own_T = own_logprobs(policy, vllm.renderer, rollout, 1.0)
        assert rollout.logprobs == pytest.approx(own_T.tolist(), abs=1e-4)
    assert vllm.metrics()["rollout/probe_gap"] < 1e-4
    assert vllm.metrics()["rollout/servers"] == 2


def test_a_tied_head_is_written_under_its_own_name_too(policy, serve, tmp_path):
    from safetensors.torch import load_file

    sampler(policy, tmp_path, [serve()]).update_weights(4)
    files = list((tmp_path / "served" / "weights-4").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert len(files) == 2


def test_stale_weights_stop_the_run(policy, serve, tmp_path):
    server = serve()
    vllm = sampler(policy, tmp_path, [server])
    vllm.update_weights(0)
    sharpen(policy)
    server.faults = lambda path, body: (200, {}) if path == "/collective_rpc" else None
    with pytest.raises(RolloutError, match=r"log-probs of a probe differ .* by \d\.\d{3}"):
        vllm.update_weights(1)


def test_log_probs_of_another_kind_are_refused(policy, serve, tmp_path):
    sharpen(policy)
    vllm = sampler(policy, tmp_path, [serve(processed=False)], temperature=0.5)
    with pytest.raises(RolloutError, match="--logprobs-mode processed_logprobs"):
        vllm.update_weights(0)
    with pytest.raises(RolloutError, match="vLLM cannot return the log-probs"):
        sampler(policy, tmp_path, [serve()], temperature=0.5, top_k=5)


def test_groups_go_round_the_servers_up_to_a_limit(policy, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(fastsd.vllm_rollout, "GROUPS_PER_SERVER", 2)
    servers = [serve(), serve()]
    vllm = sampler(policy, tmp_path, servers, max_new_tokens=2)
    vllm.update_weights(0)
    for server in servers:
        server.faults = lambda path, body: time.sleep(0.05)
    vllm.sample(PROMPTS * 4, 2, key=(1,))
    assert [len(server.asked("/v1/completions")) - 1 for server in servers] == [8, 8]
    assert [server.most_at_once for server in servers] == [2, 2]


def dies_in_the_middle(path, body):
    return "drop" if path == "/v1/completions" else None


@pytest.mark.parametrize(
    "fault", [dies_in_the_middle, lambda path, body: (503, b"busy"), lambda path, body: (500, {})]
)
def test_a_lost_server_costs_no_group_and_comes_back(policy, serve, tmp_path, fault):
    servers = [serve(), serve()]
    alone = sampler(policy, tmp_path / "alone", [serve()]).sample(PROMPTS, 3, key=(1,))
    vllm = sampler(policy, tmp_path, servers)
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
    vllm = sampler(policy, tmp_path, servers)
    vllm.update_weights(0)
    for server in servers:
        server.faults = dies_in_the_middle
    with pytest.raises(RolloutUnavailable, match="no vLLM server is left") as error:
        vllm.sample(PROMPTS, 3, key=(1,))
    assert error.value.exit_code == 3
    assert all(server.url in str(error.value) for server in servers)
    assert "--resume auto" in str(error.value)


def test_a_server_that_answers_nothing_is_lost_in_time(policy, serve, tmp_path, monkeypatch):
    server, release = serve(), threading.Event()
    vllm = sampler(policy, tmp_path, [server])
    vllm.update_weights(0)
    monkeypatch.setattr(fastsd.vllm_server, "GROUP_S", 0.2)
    server.faults = lambda path, body: release.wait(10) and "drop"
    start = time.monotonic()
    with pytest.raises(RolloutUnavailable, match="no whole reply in"):
        vllm.sample(PROMPTS[:1], 1, key=(1,))
    assert time.monotonic() - start < 5
    release.set()


def test_a_signal_ends_the_wait_at_once(policy, serve, tmp_path):
    server, release, gate = serve(), threading.Event(), SignalGate()
    vllm = sampler(policy, tmp_path, [server])
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
    sampler(policy, tmp_path, [server]).update_weights(0)
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
    vllm = sampler(policy, tmp_path, [server])
    vllm.update_weights(0)
    server.change = NONSENSE[name]
    with pytest.raises(RolloutError, match=r"the reply of http://127.*/v1/completions cannot be"):
        vllm.sample(PROMPTS[:1], 2, key=(1,))


@pytest.mark.parametrize(
    "path, answer, message",
    [
        ("/v1/models", (200, b"\xff\xfe"), "is not JSON"),
        ("/v1/models", (200, {"data": []}), "lists no model"),
        ("/v1/models", (401, b"who are \x1b[31myou"), r"HTTP 401: who are  \[31myou"),
        ("/tokenize", (200, {"tokens": [1, 2]}), "another tokenizer"),
        ("/collective_rpc", (404, b""), "VLLM_SERVER_DEV_MODE=1"),
        ("/reset_prefix_cache", (200, {"success": False}), "keeps the old weights"),
        ("/v1/completions", (400, b"max_tokens"), "HTTP 400: max_tokens"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_at_the_start(
    policy, serve, tmp_path, monkeypatch, path, answer, message
):
    server = serve()
    monkeypatch.setattr(fastsd.vllm_server, "RESET_PAUSES_S", (0.01, 0.01))
    server.faults = lambda found, body: answer if found == path else None
    with pytest.raises(RolloutError, match=message) as error:
        sampler(policy, tmp_path, [server]).sample(PROMPTS, 1, key=(1,))
    assert error.value.exit_code == 2


def test_opening_finds_wrong_settings_and_servers(policy, serve, tmp_path):
    with pytest.raises(RolloutError, match="start it with --max-model-len 268"):
        sampler(policy, tmp_path, [serve(max_model_len=200)])
    other = serve(folder=build_tiny_qwen3(tmp_path / "other", vocab_size=330))
    with pytest.raises(RolloutError, match="another tokenizer"):
        sampler(policy, tmp_path, [other])
    gone = serve()
    gone.close()
    with pytest.raises(RolloutUnavailable, match="ConnectError.*Start them"):
        sampler(policy, tmp_path, [serve(), gone])
    for url in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(RolloutError, match="rollout.servers"):
            VllmSampler(policy, None, RolloutConfig(engine="vllm", servers=[url]), tmp_path)
    with pytest.raises(RolloutError, match="rollout.servers: empty"):
        sampler(policy, tmp_path, [])


def test_the_engine_is_chosen_by_its_name(policy, tmp_path):
    renderer = PromptRenderer(policy.tokenizer, PromptConfig())
    inprocess = open_sampler(policy, renderer, RolloutConfig(), tmp_path)
    assert type(inprocess) is Sampler
    inprocess.update_weights(3)
    assert inprocess.metrics() == {} and "in-process" in inprocess.name


def run_config(folder, server, tmp_path, **changes):
    rows = tmp_path / "rows.jsonl"
    lines = (json.dumps({"question": f"What is {i} + 4?", "answer": f"{i + 4}"}) for i in range(4))
    rows.write_text("\n".join(lines), encoding="utf-8")
    tree = {
        "condition": "grpo",
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"train": str(rows), "eval": str(rows)},
        "prompt": {"max_prompt_tokens": 128},
        "rollout": {
            **{"engine": "vllm", "servers": [server.url], "stop": LETTERS},
            **{"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
        },
        "reward": {"function": "reward_functions:only_completions"},
        "loss": {"entropy_weight": 0.1},
        "optim": {"steps": 3, "lr": 0.01},
        "eval": {"questions": 2, "samples": 1},
        "checkpoint": {"every": 1, "keep": 5},
    }
    return Config(**tree, **changes)


def test_a_run_serves_each_updates_weights_and_goes_on_after_its_server_died(
    folder, serve, tmp_path
):
    """Weights 0, 1, 2 by version; the server dies, exit 3 with a checkpoint; another takes over."""
    server = serve()
    config = run_config(folder, server, tmp_path)
    server.faults = lambda path, body: len(server.asked("/collective_rpc")) == 3 and "drop"
    with pytest.raises(RolloutUnavailable, match="took the new weights") as stop:
        train(config, tmp_path / "run", Recorder("run"))
    assert stop.value.exit_code == 3
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "checkpoint-2" / "MANIFEST.json").exists()
    other = serve()
    train(run_config(folder, other, tmp_path, resume="auto"), tmp_path / "run", Recorder("run"))
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["rollout/probe_gap"] < 1e-4 and line["rollout/servers"] == 1
        assert line["rollout/logprob_gap_mean"] < 1e-4
        assert line["rollout/logprob_gap_mean"] <= line["rollout/logprob_gap_p99"] < 1e-3
    for one, versions in ((server, ["0", "1", "2"]), (other, ["2", "3"])):
        paths = [body["kwargs"]["weights_path"] for body in one.asked("/collective_rpc")]
        assert [path.rpartition("-")[2] for path in paths] == versions
