"""Training against a real vLLM server: rollouts that follow the weights, and a server critic."""

from __future__ import annotations

import json
import math
import time

import httpx
import pytest
import torch

from fastsd.config import Config
from fastsd.config.sections import ModelConfig, PromptConfig, RolloutConfig
from fastsd.model import load_policy
from fastsd.prompts.render import PromptRenderer
from fastsd.records.folder import read_metrics
from fastsd.rollout.vllm import PROBE_TOLERANCE, VllmSampler
from fastsd.serving.fleet import ask
from fastsd.serving.server import RolloutError
from fastsd.train import train
from fastsd.training.recorder import Recorder
from fastsd.types import Prompt

pytestmark = [pytest.mark.vllm]

ROWS = [
    {
        "question": f"Tom has {a} apples and buys {b} more. How many has he? Answer with a number.",
        "answer": str(a + b),
        "solution": f"Step 1: {a} + {b} = {a + b}\nAnswer: {a + b}",
    }
    for a, b in ((3, 4), (12, 7), (20, 5), (6, 9), (31, 8), (2, 2))
]
UPDATES = 3


def config_for(model, place, **sections) -> Config:
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    tree = {
        "model": {"name": str(model)},
        "data": {"train": str(rows), "eval": str(rows)},
        "prompt": {"max_prompt_tokens": 256, "max_feedback_tokens": 256},
        "reward": {"function": "odd_reward:odd_lengths"},
        "optim": {"steps": UPDATES, "lr": 3e-4},
        "eval": {"questions": 2, "samples": 2, "temperature": 0.7},
        "checkpoint": {"every": 0, "keep": 1},
    }
    rollout = {"prompts_per_step": 2, "samples_per_prompt": 4, "max_new_tokens": 48}
    return Config(**tree, rollout=rollout | sections.pop("rollout", {}), **sections)


def run_training(config, run_dir) -> list[dict]:
    train(config, run_dir, Recorder(run_dir.name))
    metrics = read_metrics(run_dir)
    assert [line["step"] for line in metrics] == list(range(1, UPDATES + 1))
    assert all(math.isfinite(line["loss"]) and not line["skipped"] for line in metrics)
    assert (run_dir / f"checkpoint-{UPDATES}" / "MANIFEST.json").exists()
    return metrics


def sampler_at(server, model, folder, **options) -> VllmSampler:
    policy = load_policy(ModelConfig(name=str(model)), "cpu", torch.bfloat16)
    config = RolloutConfig(engine="vllm", servers=[server], max_new_tokens=48, **options)
    renderer = PromptRenderer(policy.tokenizer, PromptConfig(max_prompt_tokens=256))
    return VllmSampler(policy, renderer, config, folder)


def served_probe(sampler: VllmSampler):
    """(ids, logprobs) that the server gives for the sampler's probe, whatever weights it holds."""
    [server], vocabulary = sampler.fleet.servers, len(sampler.policy.head_VD)
    return ask(lambda client: server.complete(client, sampler._probe(), vocabulary))[0]


def critic_at(server) -> dict:
    return {
        **{"kind": "server", "url": f"{server}/v1", "model": "smol", "min_verbatim": 0.0},
        **{"max_tokens": 96, "on_invalid": "reward_only", "timeout_s": 120.0},
    }


def check_critiques(config, run_dir, metrics) -> None:
    """Every request was answered; what the replies were not good for is counted."""
    groups = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    for line in metrics:
        problems = {n.rsplit("/", 1)[1]: v for n, v in line.items() if "feedback/problem/" in n}
        print(f"critiques without use, by class: {problems}")
        in_transit = {"timeout", "connection", "server_error", "client_error", "bad_reply"}
        assert not in_transit & set(problems)
        assert sum(problems.values()) == round(groups * line["feedback/missing_share"])
    assert list((run_dir / "critiques").rglob("*")), "replies are kept"


def test_server_critic(server, model, place):
    """The critic is the server with the published weights; rollouts come from this process."""
    loss, critic = {"policy_weight": 1.0}, critic_at(server)
    config = config_for(model, place, condition="critique", loss=loss, critic=critic)
    check_critiques(config, place / "run", run_training(config, place / "run"))


def test_rollouts_and_critic_of_one_server_follow_the_weights(server, model, place):
    """Three updates: the trainer agrees with what is served before each, and after them the server,
    which as a critic follows the training too, enough to test the plumbing, says something else."""
    before = sampler_at(server, model, place / "base", temperature=1.1)
    before.update_weights(0)
    base_ids, base_logprobs = served_probe(before)
    assert served_probe(before) == (base_ids, base_logprobs), "the same weights, the same reply"

    config = config_for(
        model,
        place,
        condition="critique",
        rollout={"engine": "vllm", "servers": [server], "temperature": 1.1},
        loss={"policy_weight": 1.0},
        critic=critic_at(server),
    )
    metrics = run_training(config, place / "run")
    check_critiques(config, place / "run", metrics)
    for line in metrics:
        gaps = [line[f"rollout/{n}"] for n in ("probe_gap", "logprob_gap_mean", "logprob_gap_p99")]
        print(f"log-prob gaps: probe {gaps[0]:.4f}, mean {gaps[1]:.4f}, p99 {gaps[2]:.4f}")
        assert gaps[0] <= PROBE_TOLERANCE and gaps[1] <= PROBE_TOLERANCE and gaps[2] <= 0.5
        assert line["rollout/servers"] == 1 and line["rollout/staleness"] == 0
        assert line["rollout/retried_groups"] == 0
        print(f"tokens/s {line['tokens_per_s/rollout']:.0f}, sync {line['rollout/sync_s']:.1f} s")
    mark = httpx.get(f"{server}/weight_info", trust_env=False).json()["weight_version"]
    assert mark.startswith(f"fastsd-{UPDATES}-"), "the last evaluation left the trained weights"

    trained = place / "run" / f"checkpoint-{UPDATES}"
    after = sampler_at(server, trained, place / "trained", temperature=1.1)
    served_ids, served_logprobs = served_probe(after)
    assert (served_ids, served_logprobs) != (base_ids, base_logprobs)
    gap = after._gap(served_ids, served_logprobs, 1.1)
    stale = before._gap(served_ids, served_logprobs, 1.1)
    print(f"the server's gap to the trained weights {gap:.4f}, to the base {stale:.4f}")
    assert gap <= PROBE_TOLERANCE and stale > 2 * gap


def test_served_responses_are_the_policys_own(server, model, place):
    """Stops, truncation and text as in this process, and groups of samples that differ."""
    sampler = sampler_at(server, model, place, temperature=0.8)
    prompts = [
        Prompt(str(i), ({"role": "user", "content": r["question"]},)) for i, r in enumerate(ROWS)
    ]
    sampler.update_weights(0)
    start = time.monotonic()
    rollouts = sampler.sample(prompts, 8, key=(1,))
    tokens = sum(len(r.response_ids) for r in rollouts)
    print(f"{tokens / (time.monotonic() - start):.0f} served tokens/s")
    assert [(r.prompt.id, r.sample) for r in rollouts] == [
        (p.id, i) for p in prompts for i in range(8)
    ]
    assert len({r.response_ids for r in rollouts}) > 0.9 * len(rollouts)
    for rollout in rollouts:
        assert rollout.truncated != (rollout.response_ids[-1] in sampler.stop_ids)
        assert "<|im_end|>" not in rollout.text
    assert {r.truncated for r in rollouts} == {True, False}


def test_a_tied_head_is_renewed(server, model, place):
    """vLLM on a CPU keeps a packed copy of the head, which embeddings alone do not renew."""
    sampler = sampler_at(server, model, place)
    sampler.update_weights(0)
    torch.manual_seed(0)
    with torch.no_grad():
        head_VD = sampler.policy.head_VD
        head_VD += 0.1 * head_VD.std() * torch.randn_like(head_VD)
    stale = sampler._gap(*served_probe(sampler), 1.0)
    sampler.update_weights(1)
    renewed = sampler.metrics()["rollout/probe_gap"]
    print(f"gap of a changed head {stale:.4f}, renewed {renewed:.4f}")
    assert renewed <= PROBE_TOLERANCE and stale > 2 * renewed


def test_log_probs_of_another_kind_are_noticed(server, model, place):
    """This server returns processed log-probs; with top-k training needs others."""
    sampler = sampler_at(server, model, place, top_k=5)
    with pytest.raises(RolloutError, match="without --logprobs-mode where rollout.top_k"):
        sampler.update_weights(0)
