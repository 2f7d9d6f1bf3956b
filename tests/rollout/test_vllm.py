"""Rollouts from vLLM servers, against one that answers as they do (`fake_vllm`)."""

import copy
import json
import math

import pytest
import torch
from fake_vllm import FIXTURES, LETTERS, PROMPTS, open_tiny
from safetensors.torch import load_file

import fastsd.parallel.placement
from fastsd.config import Config
from fastsd.config.sections import LoraConfig, ModelConfig, PromptConfig, RolloutConfig
from fastsd.model import load_policy
from fastsd.prompts.render import PromptRenderer
from fastsd.records.folder import read_metrics
from fastsd.rollout import Sampler, open_sampler
from fastsd.serving.server import RolloutError, RolloutUnavailable
from fastsd.serving.weights import names_of_head, write_weights
from fastsd.train import train
from fastsd.training.recorder import Recorder
from fastsd.types import Branch, TokenTree
from fastsd_kernels import fused_linear_statistics

folder, policy, serve = FIXTURES


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
    vllm = open_tiny(policy, tmp_path, [server], temperature=temperature)
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
    vllm = open_tiny(policy, tmp_path, [server], top_k=7, top_p=0.9)
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
    vllm = open_tiny(policy, tmp_path, [serve()])
    first = vllm.sample(PROMPTS, 2, key=(1, 2))
    assert vllm.sample(PROMPTS, 2, key=(1, 2)) == first
    assert vllm.sample(PROMPTS, 2, key=(1, 3)) != first
    twice = vllm.sample([PROMPTS[0]] * 2, 2, key=(1, 2))
    assert twice[0].response_ids != twice[2].response_ids
    assert vllm.sample([], 2, key=(1,)) == []


def test_a_draw_at_another_temperature_has_no_log_probs(policy, serve, tmp_path):
    vllm = open_tiny(policy, tmp_path, [serve()])
    [rollout] = vllm.sample(PROMPTS[:1], 1, key=(1,), temperature=0.5)
    assert rollout.logprobs and all(map(math.isnan, rollout.logprobs))


def test_servers_get_the_weights_of_each_version_once(policy, serve, tmp_path):
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers)
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


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=["q_proj"])])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_a_tied_head_is_written_under_its_own_name_too(folder, tmp_path, lora, shard):
    policy = load_policy(ModelConfig(name=str(folder), lora=lora), "cpu", torch.float32)

    def save(place):
        model = copy.deepcopy(policy.model)
        model = model.merge_and_unload() if lora else model
        model.save_pretrained(place, max_shard_size=shard)

    place = write_weights(save, names_of_head(policy), tmp_path, 4)
    files = list(place.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    index = place / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 2)
    if index.exists():
        listed = json.loads(index.read_text())["weight_map"]
        assert set(listed) == set(tensors) and set(listed.values()) == {f.name for f in files}


def test_stale_weights_stop_the_run(policy, serve, tmp_path):
    server = serve()
    vllm = open_tiny(policy, tmp_path, [server])
    vllm.update_weights(0)
    sharpen(policy)
    server.faults = lambda path, body: (200, {}) if path == "/collective_rpc" else None
    with pytest.raises(RolloutError, match=r"log-probs of a probe differ .* by \d\.\d{3}"):
        vllm.update_weights(1)


def test_log_probs_of_another_kind_are_refused(policy, serve, tmp_path):
    sharpen(policy)
    vllm = open_tiny(policy, tmp_path, [serve(processed=False)], temperature=0.5)
    with pytest.raises(RolloutError, match="--logprobs-mode processed_logprobs"):
        vllm.update_weights(0)
    with pytest.raises(RolloutError, match="vLLM cannot return the log-probs"):
        open_tiny(policy, tmp_path, [serve()], temperature=0.5, top_k=5)


def test_weights_may_be_older_by_so_many_updates(policy, serve, tmp_path):
    server = serve()
    vllm = open_tiny(policy, tmp_path, [server])
    behind, given = [], []
    for version in (0, 1, 2, 3, 4, 7):
        vllm.update_weights(version, staleness=2)
        behind.append(vllm.metrics()["rollout/staleness"])
        given.append(len(server.asked("/collective_rpc")))
    assert (behind, given) == ([0, 1, 2, 0, 1, 0], [1, 1, 1, 2, 2, 3])
    vllm.update_weights(8)
    assert len(server.asked("/collective_rpc")) == 4, "an evaluation gets the present ones"
    assert vllm.metrics()["rollout/staleness"] == 0


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
    resumed = run_config(folder, other, tmp_path, resume="auto")
    free = {"concurrency": 1, "timeout_s": 60.0, "server_tokens": 500, "sync": "files"}
    rollout = resumed.rollout.model_copy(update=free)
    train(resumed.model_copy(update={"rollout": rollout}), tmp_path / "run", Recorder("run"))
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["rollout/probe_gap"] < 1e-4 and line["rollout/servers"] == 1
        assert line["rollout/logprob_gap_mean"] < 1e-4
        assert line["rollout/logprob_gap_mean"] <= line["rollout/logprob_gap_p99"] < 1e-3
    for one, versions in ((server, ["0", "1", "2"]), (other, ["2", "3"])):
        paths = [body["kwargs"]["weights_path"] for body in one.asked("/collective_rpc")]
        assert [path.rpartition("-")[2] for path in paths] == versions


def test_stale_responses_are_weighed_by_what_they_were_sampled_with(
    folder, serve, tmp_path, monkeypatch
):
    """max_staleness = 1: weights 0, 2 and the last for the evaluation; a ratio to old log-probs."""
    server, shift = serve(), -0.01

    def change(reply):
        for choice in reply["choices"]:
            logprobs = choice["logprobs"]
            logprobs["token_logprobs"] = [v + shift for v in logprobs["token_logprobs"]]
        return reply

    seen, head = [], fastsd.parallel.placement.fused_linear_loss

    def spy(*args, **options):
        out = head(*args, **options)
        seen.append((options["old_logprob_T"].cpu(), out.student_logprob_T.detach().cpu()))
        return out

    monkeypatch.setattr(fastsd.parallel.placement, "fused_linear_loss", spy)
    server.change = change
    config = run_config(folder, server, tmp_path)
    rollout = config.rollout.model_copy(update={"max_staleness": 1})
    evaluation = config.eval.model_copy(update={"temperature": 0.5})
    config = config.model_copy(update={"rollout": rollout, "eval": evaluation})
    train(config, tmp_path / "run", Recorder("run"))
    lines = read_metrics(tmp_path / "run")
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 0]
    paths = [body["kwargs"]["weights_path"] for body in server.asked("/collective_rpc")]
    assert [path.rpartition("-")[2] for path in paths] == ["0", "2", "3"]
    assert all(math.isfinite(line["loss"]) for line in lines)
    gaps = [line["rollout/logprob_gap_mean"] for line in lines]
    assert gaps[0] == pytest.approx(-shift, abs=1e-3) == gaps[2] and gaps[1] > 0.015
    for line, (old_T, new_T) in zip(lines, seen, strict=True):
        assert bool(old_T.isfinite().all())
        assert line["rollout/logprob_gap_mean"] == pytest.approx(
            float((new_T - old_T).abs().mean())
        )
