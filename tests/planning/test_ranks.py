"""What the planner says that ranks receive and keep, against two ranks that count it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import plan_ranks_worker
import pytest
import torch
from ranks import run_ranks
from small_runs import LORA, small_config
from tiny_models import build_tiny, build_tiny_llama

from fastsd.config import Config
from fastsd.config.sections import LoraConfig, ModelConfig
from fastsd.errors import FastsdError
from fastsd.planning.counts import count_step, streams
from fastsd.planning.hardware import parse_hardware
from fastsd.planning.memory import memory
from fastsd.planning.model import ModelCounts, count_model
from fastsd.planning.ranks import Site, make_site, over_ranks
from fastsd.planning.rows import Lengths, Step
from fastsd.planning.step import Asked, Plan, make_plan

AT = {"question": 24, "feedback": 18, "response": 9, "samples": 4}
LENGTHS = Lengths(**AT, longest_response=9)
STEP = Step(LENGTHS, 2, "group", True, 16384, False, 256)
FOUR = Site("gpu", 4, True, "live", True)


def settings(condition: str, **changes) -> Config:
    rollout = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 16}
    return small_config(condition, rollout=rollout, **changes)


def cases(untied: Path) -> dict[str, Config]:
    own_head = {
        "model": {"name": str(untied)},
        "prompt": {"max_prompt_tokens": 512, "max_feedback_tokens": 512},
    }
    split = {"head": "sharded"}
    return {
        # Groups in parts, layers computed again, copies of everything, sums in bf16.
        "ema in parts": settings(
            "critique",
            teacher={"kind": "ema"},
            model={"gradient_checkpointing": True, "dtype": "bfloat16"},
            optim={"micro_batch_tokens": 90},
            parallel={"reduce_dtype": "model"},
        ),
        "adapters": settings("critique", teacher={"kind": "adapter_off"}, model={"lora": LORA}),
        "own head": settings("reference", teacher={"kind": "live"}, **own_head),
        "own head, split": settings("reference", parallel=split, **own_head),
        "tied head, split": settings("grpo", parallel=split),
    }


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return cases(build_tiny("qwen3", tmp_path_factory.mktemp("model") / "untied"))


@pytest.fixture(scope="module")
def counted(configs, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    found = {
        name: {"config": config.model_dump(mode="json"), "lengths": AT}
        for name, config in configs.items()
    }
    run_ranks(plan_ranks_worker.main, folder, found)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def plan_of(config: Config) -> Plan:
    lengths = {name: AT[name] for name in ("question", "feedback", "response")}
    return make_plan(config, Asked(parse_hardware("2xH100"), None, None, **lengths))


@pytest.mark.parametrize("name", list(cases(Path())))
def test_a_rank_receives_and_keeps_what_is_planned(name, configs, counted):
    plan = plan_of(configs[name])
    planned: dict[str, float] = {}
    for work in plan.works:
        phase = "head" if work.phase.startswith("loss head") else work.phase
        if work.link_bytes:
            planned[phase] = planned.get(phase, 0) + work.link_bytes
    for rank in counted:
        # Tensors that do not divide evenly are padded.
        assert rank[name]["bytes"] == pytest.approx(planned, rel=0.002)
        assert f"head {plan.site.head}" in rank[name]["layout"]
        held = plan.memory.resident
        assert rank[name]["weights"] == pytest.approx(held["weights, shards"], rel=0.002)
        assert rank[name]["moments"] == pytest.approx(held["optimizer moments"], rel=0.002)
        assert rank[name]["teacher"] == pytest.approx(held["teacher copy"], rel=0.002)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> ModelCounts:
    folder = build_tiny_llama(tmp_path_factory.mktemp("models") / "llama")
    return count_model(ModelConfig(name=str(folder)), torch.float32)


def spread(model: ModelCounts, site: Site) -> dict:
    works = over_ranks(model, count_step(model, STEP), site, streams(STEP))
    return {work.phase: work for work in works}


def test_ranks_gather_weights_for_each_pass_and_sum_gradients(llama):
    works, alone = spread(llama, FOUR), {w.phase: w for w in count_step(llama, STEP)}
    layers = 4 * (llama.parameters - llama.root)
    assert works["student forward"].link_bytes == 0.75 * 4 * llama.parameters
    assert works["teacher forward"].link_bytes == 0.75 * layers
    assert works["student backward"].link_bytes == 0.75 * (layers + 4 * llama.trainable)
    assert works["rollout decode"].link_bytes == 0.75 * 4 * llama.parameters
    assert not works["optimizer"].link_bytes
    assert works["optimizer"].swept_bytes == alone["optimizer"].swept_bytes / 4


def test_a_split_head_has_the_same_operations_and_a_part_of_the_memory(llama):
    own = replace(llama, tied=False)
    whole, split = spread(own, FOUR), spread(own, replace(FOUR, head="sharded"))
    for way in ("forward", "backward"):
        phase = f"loss head {way}"
        assert split[phase].flop == pytest.approx(whole[phase].flop, rel=0.02)  # V rounded up
        assert split[phase].link_bytes and not whole[phase].link_bytes
    assert "loss head backward" in split and len(split) == len(whole)
    held = memory(own, STEP, FOUR), memory(own, STEP, replace(FOUR, head="sharded"))
    kept = [found.resident["weights, gathered"] for found in held]
    assert kept[0] - kept[1] == 4 * own.head_weights
    # Most of the vocabulary of a large model, and none of its rows.
    large = replace(own, vocabulary=150_000, hidden=4096, width=2)
    whole, split = (
        memory(large, STEP, replace(FOUR, ranks=64, head=head)).training
        for head in ("gathered", "sharded")
    )
    name = "one layer's work, or the loss head"
    assert split[name] < 0.5 * whole[name]


def test_a_teacher_copy_is_gathered_and_kept_whole_adapters_are_not(llama):
    frozen = replace(FOUR, teacher="frozen")
    root = 0.75 * 4 * llama.root
    more = spread(llama, frozen)["teacher forward"].link_bytes
    assert more == spread(llama, FOUR)["teacher forward"].link_bytes + root
    held = memory(llama, STEP, frozen).resident
    assert held["teacher copy"] == llama.weight_bytes / 4


def test_the_layout_of_the_head_is_the_trainers(llama, tmp_path):
    chosen = settings("reference", parallel={"head": "sharded"})
    assert make_site(chosen, llama, "gpu", 4, True).head == "sharded"
    assert make_site(settings("reference"), llama, "gpu", 4, True).head == "gathered"  # tied
    few = replace(llama, tied=False, vocabulary=100_000)
    assert make_site(settings("reference"), few, "gpu", 4, True).head == "sharded"
    assert make_site(settings("reference"), few, "gpu", 1, True).head == "gathered"
    with pytest.raises(FastsdError, match="parallel.head"):
        make_site(chosen, replace(llama, vocabulary=3), "gpu", 2048, True)


def test_adapters_leave_the_other_weights_in_their_own_type(tmp_path):
    folder = build_tiny_llama(tmp_path / "llama")
    config = ModelConfig(name=str(folder), lora=LoraConfig(r=4, alpha=8))
    model = count_model(config, torch.bfloat16)
    frozen = model.parameters - model.trainable
    held = memory(model, STEP, FOUR).resident
    assert held["weights, shards"] == (2 * frozen + 4 * model.trainable) / 4
