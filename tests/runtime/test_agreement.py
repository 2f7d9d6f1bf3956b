"""Ranks that would not train the same thing are refused before the first update, by name."""

import json
import shutil
from pathlib import Path

import agreement_worker
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

import fastsd
from fastsd.errors import FastsdError
from fastsd.runtime import agreement
from fastsd.runtime.agreement import refuse_differences
from fastsd.runtime.world import ALONE, World, _refuse_other_devices, _take_gpu
from fastsd.tasks import chain_sum
from fastsd.training import preflight

BASE = Path(chain_sum.__file__).parent / "chain_sum_base"


def node(folder: Path, rank: int) -> None:
    """A machine's own model and rows under the names that both have."""
    shutil.copytree(BASE, folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] += rank * 1e-3
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"question": f"{n}+1", "answer": str(n + 1 + rank * (n == 3))} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    for rank in range(2):
        (folder / f"node-{rank}").mkdir()
        node(folder / f"node-{rank}", rank)
    run_ranks(agreement_worker.main, folder)
    return folder


@pytest.fixture(scope="module")
def answers(nodes):
    return [json.loads((nodes / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("other_settings", ("seeds is 2 on rank 1", "and 1 on rank 0", "and 1 more: optim.lr")),
        ("other_sections", ("model.lora is not set on rank 1", "model.lora.r")),
        ("other_packages", ('transformers is "5.1" on rank 1', '"5.0" on rank 0')),
        ("other_weights", ("the digest of the weights",)),
        ("other_questions", ("the digest of the questions",)),
    ],
)
def test_every_rank_names_what_differs(answers, case, parts):
    for answer in answers:
        assert answer[case].startswith("the processes do not start alike: ")
        assert "give every node the same files, flags and installation" in answer[case]
        for part in parts:
            assert part in answer[case]


def test_nothing_else_differs(answers):
    for case in ("other_packages", "other_weights", "other_questions"):
        assert "more:" not in answers[0][case]


def test_a_run_folder_that_is_not_shared_is_refused_before_any_update(nodes, answers):
    assert [answer["shared"] for answer in answers] == ["", ""]
    assert (nodes / "node-0" / "run" / "checkpoint-1").is_dir()
    assert not (nodes / "node-1" / "run" / "metrics.jsonl").exists()
    assert not list(nodes.glob("node-*/run/.shared-*"))
    for answer in answers:
        for case in ("fresh", "resumed"):
            assert "run = 'run' is not the same folder on" in answer[case]
            assert "a file system that all machines share" in answer[case]


def test_one_process_computes_no_digest():
    refuse_differences(ALONE, lambda: pytest.fail("called"))


def test_the_digest_of_the_weights_sees_names_shapes_types_and_values():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    digest = preflight._weights_digest(weights)
    changed = [
        {"c": weights["a"], "b": weights["b"]},
        {**weights, "a": weights["a"].view(3, 2)},
        {**weights, "b": torch.zeros(2, dtype=torch.int32)},
        {**weights, "b": torch.tensor([0.0, -0.0])},
        {**weights, "a": weights["a"].nextafter(torch.tensor(9.0))},
        {"a": weights["a"]},
    ]
    assert preflight._weights_digest({k: v.clone() for k, v in weights.items()}) == digest
    assert digest not in [preflight._weights_digest(other) for other in changed]
    uneven = torch.arange(16, dtype=torch.uint8)
    assert preflight._bit_sum(uneven[1:12]) == preflight._bit_sum(uneven[1:12].clone())
    scalar = {"s": torch.tensor(1.5, dtype=torch.bfloat16), "e": torch.zeros(0)}
    assert preflight._weights_digest(scalar) != digest


def test_the_digest_of_the_code_sees_an_edit(tmp_path, monkeypatch):
    package = tmp_path / "fastsd"
    package.mkdir()
    monkeypatch.setattr(fastsd, "__file__", str(package / "__init__.py"))
    (package / "a.py").write_text("x = 1")
    (package / "_native.so").write_text("built here")
    before = agreement._code_digest()
    (package / "_native.so").write_text("built there")
    assert agreement._code_digest() == before
    (package / "a.py").write_text("x = 2")
    assert agreement._code_digest() != before


def test_a_node_without_gpus_among_others_is_refused():
    store = torch.distributed.HashStore()
    store.set("device/1", "the CPU")
    with pytest.raises(FastsdError, match="rank 0 would run on CUDA and rank 1 on the CPU"):
        _refuse_other_devices(store, World(0, 2), "CUDA")
    _refuse_other_devices(store, World(0, 2), "the CPU")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(FastsdError, match="4 processes on this machine.* 2 GPUs"):
        _take_gpu(World(0, 4))
