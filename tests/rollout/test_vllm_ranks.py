"""Two ranks that draw from the same servers: the run of one process, and its end on all ranks."""

import json
import signal

import pytest
import torch
import vllm_ranks_worker
from fake_vllm import LETTERS, FakeVllm
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import build_tiny_llama
from torchrun import finished, torchrun

import fastsd.training.experiment
from fastsd.checkpoint import checkpoints
from fastsd.config import Config, dump_toml, load_config
from fastsd.errors import Interrupted
from fastsd.records.folder import read_evaluations, read_metrics
from fastsd.train import train
from fastsd.training.experiment import run_experiment
from fastsd.training.recorder import Recorder

STEPS = 3


@pytest.fixture
def servers(tmp_path):
    folder = build_tiny_llama(tmp_path / "model")
    running = [FakeVllm(folder), FakeVllm(folder)]
    yield running
    for server in running:
        server.close()


def config_for(tmp_path, servers) -> Config:
    rows = tmp_path / "rows.jsonl"
    row = {"answer": "4", "solution": "Step 1: It is 4.\nAnswer: 4"}
    lines = [json.dumps({"question": f"What is {i} + 4?", **row}) for i in range(8)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    return Config(
        condition="grpo",
        model={"name": str(tmp_path / "model"), "dtype": "float32"},
        data={"train": str(rows), "eval": str(rows)},
        prompt={"max_prompt_tokens": 128},
        rollout={
            **{"engine": "vllm", "servers": [server.url for server in servers], "stop": LETTERS},
            **{"prompts_per_step": 4, "samples_per_prompt": 3, "max_new_tokens": 8},
            **{"max_staleness": 1, "concurrency": 4},
        },
        reward={"function": "reward_functions:only_completions"},
        loss={"entropy_weight": 0.1},
        optim={"steps": STEPS, "lr": 0.01},
        eval={"questions": 4, "samples": 2},
        report={"questions": 2, "samples": 2, "rollouts": 0},
        checkpoint={"every": 0},
    )


def run_two(config, run_dir) -> None:
    run_dir.mkdir()
    run_ranks(vllm_ranks_worker.main, config, run_dir)


def handed_over(server) -> list[str]:
    return [b["kwargs"]["weights_path"].rpartition("-")[2] for b in server.asked("/collective_rpc")]


def test_two_ranks_train_as_one_process(servers, tmp_path):
    config = config_for(tmp_path, servers)
    servers[0].given = servers[1].given = {}
    train(config, tmp_path / "one", Recorder("one"))
    assert [handed_over(server) for server in servers] == [["0", "2", "3"]] * 2
    for server in servers:
        server.restart()
        server.requests.clear()
    run_two(config, tmp_path / "two")
    assert not list((tmp_path / "two").glob("error-*"))
    assert [handed_over(server) for server in servers] == [["0", "2", "3"]] * 2, "by one rank"
    pairs = list(zip(*(read_metrics(tmp_path / run) for run in ("one", "two")), strict=True))
    assert len(pairs) == STEPS
    for one, two in pairs:
        same = ("loss", "reward/mean", "rollout/staleness", "rollout/servers", "trained_tokens")
        assert [two[name] for name in same] == pytest.approx([one[name] for name in same], abs=1e-4)
        assert two["rollout/probe_gap"] < 1e-4
    saved = [checkpoints(tmp_path / run)[0][1] / "model.safetensors" for run in ("one", "two")]
    one, two = map(load_file, saved)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.slow
def test_without_servers_all_ranks_end_and_the_run_is_saved(servers, tmp_path):
    def dies(path, body):
        """After the first update, in the middle of a batch."""
        batch = sum(len(server.asked("/v1/completions")) for server in servers) > 12
        return "drop" if batch else None

    for server in servers:
        server.faults = dies
    run_two(config_for(tmp_path, servers), tmp_path / "two")
    errors = [json.loads(file.read_text()) for file in (tmp_path / "two").glob("error-*")]
    assert [error["kind"] for error in errors] == ["RolloutUnavailable"] * 2
    assert [line["step"] for line in read_metrics(tmp_path / "two")] == [1]
    assert checkpoints(tmp_path / "two")[0][0] == 1


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_localisation_goes_on_with_two_ranks(
    servers, tmp_path, monkeypatch
):
    """The base is evaluated and not again, so that only the localisation needs the weights."""
    run_dir = tmp_path / "run"
    config = config_for(tmp_path, servers).model_copy(update={"run": str(run_dir)})
    toml = tmp_path / "run.toml"
    toml.write_text(dump_toml(config))

    def stops(*_):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(fastsd.training.experiment, "_measure", stops)
    with pytest.raises(Interrupted):
        run_experiment(load_config([str(toml)]), train)
    assert not (run_dir / "localisation.json").exists()
    [(step, base)] = read_evaluations(run_dir)
    for server in servers:
        server.restart()
        server.requests.clear()
    command = ["-m", "--", "fastsd.train", str(toml), "--resume", "auto"]
    output = finished(torchrun(*command), timeout_s=300)
    assert "reference" in json.loads((run_dir / "localisation.json").read_text())
    assert read_evaluations(run_dir) == [(step, base)]
    assert json.loads(output.splitlines()[-1])["run"] == str(run_dir)
    assert handed_over(servers[0])[:1] == ["0"], "by one rank, before the localisation"
