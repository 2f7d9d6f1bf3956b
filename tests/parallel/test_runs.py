"""A run of two ranks is the run of one: losses, weights, metrics, checkpoints, and half the memory.

Every case is trained in this process and by two gloo ranks (sharded_run_worker.py), on the same
tokens (given_draws.py); two are then continued at the other number of ranks.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_run_worker import run_cases
from sharded_settings import STEPS, newest, settings
from small_runs import LORA, final_state, losses
from tiny_models import build_tiny
from torchrun import finished, torchrun
from transformers import AutoModelForCausalLM

from fastsd.checkpoint import checkpoints
from fastsd.checkpoint.tensors import SavedTensors

# Between two batches of rollouts, and within one: the buffer is part of what is carried over.
RESUMED = {"reference-ema": 5, "critique-hybrid": 5}


SPLIT = {"head": "sharded"}


def cases(untied: Path) -> dict[str, dict]:
    twice = {"steps_per_batch": 2}
    return {
        "grpo": settings("grpo"),
        "reference-live": settings("reference", teacher={"kind": "live"}),
        "reference-ema": settings("reference", teacher={"kind": "ema"}, rollout=twice),
        "reference-frozen": settings("reference", model={"freeze": ["embed", "layers.0."]}),
        # Several micro-batches, groups in parts, both terms, layers computed again.
        "critique-hybrid": settings(
            "critique",
            model={"gradient_checkpointing": True},
            rollout=twice,
            loss={"policy_weight": 0.5, "entropy_weight": 0.01},
            optim={"micro_batch_tokens": 120},
        ),
        "critique-off": settings("critique", teacher={"kind": "adapter_off"}, model={"lora": LORA}),
        # A random model of another kind: its head is no embedding. Its answers are all wrong.
        "untied": settings(
            "reference",
            model={"name": str(untied)},
            prompt={"max_prompt_tokens": 512, "max_feedback_tokens": 512},
            guard={"collapse": "off"},
        ),
        # The head's vocabulary split over the ranks: its own weights, the embedding's, frozen ones,
        # a second head of the teacher's. Ranks have different numbers of rows.
        "untied-split": settings(
            "reference",
            model={"name": str(untied)},
            prompt={"max_prompt_tokens": 512, "max_feedback_tokens": 512},
            guard={"collapse": "off"},
            teacher={"kind": "ema"},
            rollout={"prompts_per_step": 3},
            parallel=SPLIT,
        ),
        "hybrid-split": settings(
            "critique",
            model={"gradient_checkpointing": True},
            rollout=twice,
            loss={"policy_weight": 0.5, "entropy_weight": 0.01, "clip": 0.2, "top_k": 5},
            optim={"micro_batch_tokens": 120},
            parallel=SPLIT,
        ),
        "off-split": settings(
            "critique", teacher={"kind": "adapter_off"}, model={"lora": LORA}, parallel=SPLIT
        ),
        # The last token is all but certain: its gradient, 1 - p, is rounding, which AdamW with a
        # small eps makes whole steps of. One process differs by 1e-5 so between implementations.
        "grpo-split": settings(
            "grpo", rollout={"prompts_per_step": 3}, optim={"eps": 1e-6}, parallel=SPLIT
        ),
        # Groups without a right sibling have no teacher: one rank may have less to do.
        "sibling": settings("sibling", rollout={"prompts_per_step": 2}),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    trees = cases(build_tiny("qwen3", folder / "untied"))
    run_cases(folder, 1, trees)
    resumed = {f"{name}-resumed": trees[name] for name in RESUMED}
    from_one = {f"{name}-resumed": (f"{name}-1", step) for name, step in RESUMED.items()}
    run_cases(folder, 2, trees | resumed, from_one)
    from_two = {f"{name}-resumed": (f"{name}-2", step) for name, step in RESUMED.items()}
    run_cases(folder, 1, resumed, from_two)
    return folder


def assert_close(a: Path, b: Path, tolerance: float) -> None:
    """Tensors of two checkpoints, each relative to its norm."""
    for part, load in (("model.safetensors", load_file), ("trainer", load_state)):
        ours, theirs = load(a / part), load(b / part)
        assert ours.keys() == theirs.keys()
        for name, want in theirs.items():
            assert ours[name].dtype == want.dtype
            if "exp_avg" in name or name == "torch_rng":
                continue
            gap = (ours[name].double() - want.double()).norm() / want.double().norm()
            assert gap <= tolerance, (part, name, gap)


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    saved = SavedTensors(folder)
    return {name: saved.whole(name) for name in saved}


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


NAMES = list(cases(Path("none")))


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_weights_are_those_of_one_process(folder, name):
    one, two = folder / f"{name}-1", folder / f"{name}-2"
    assert not list(folder.glob(f"{name}-*/error-*")), name
    want, got = losses(one), losses(two)
    assert len(want) == STEPS and len({loss for _, loss in want}) > 2
    for (_, a), (_, b) in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert_close(newest(two), newest(one), 1e-5)


# How much was computed depends on how groups were spread; seconds and memory are the machine's.
OWN = ("time/", "tokens_per_s/", "memory/", "tokens/", "tokens_saved/", "sharing/")


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_one_process(folder, name):
    one, two = metrics(folder / f"{name}-1"), metrics(folder / f"{name}-2")
    for want, got in zip(one, two, strict=True):
        assert want.keys() == got.keys()
        for key in want:
            if not key.startswith(OWN):
                assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-5), key


def test_evaluations_and_completions_are_those_of_one_process(folder):
    for name in NAMES:
        one, two = folder / f"{name}-1", folder / f"{name}-2"
        assert (one / "evaluation.json").read_text() == (two / "evaluation.json").read_text()
        files = [sorted(p.name for p in run.glob("completions/*")) for run in (one, two)]
        assert files[0] == files[1] and files[0]


def test_a_rank_has_its_part_of_a_sharded_head_and_all_of_a_gathered_one(folder):
    for name in NAMES:
        whole = json.loads((folder / f"{name}-1" / "memory-0.json").read_text())["head rows"]
        for rank in range(2):
            part = json.loads((folder / f"{name}-2" / f"memory-{rank}.json").read_text())
            split = [-(-whole // 2), whole // 2][rank] if name.endswith("-split") else whole
            assert part["head rows"] == split, (name, rank)
        facts = json.loads((folder / f"{name}-2" / "run.json").read_text())["implementations"]
        assert ("head sharded" in facts["weights"]) == name.endswith("-split")
        assert (facts["loss_head"] == "sharded by vocabulary") == name.endswith("-split")


def test_a_rank_holds_half_of_what_trains(folder):
    for name in ("grpo", "critique-off", "untied", "untied-split", "hybrid-split"):
        whole = json.loads((folder / f"{name}-1" / "memory-0.json").read_text())
        for rank in range(2):
            part = json.loads((folder / f"{name}-2" / f"memory-{rank}.json").read_text())
            for what in ("parameters", "optimizer", "gradients"):
                assert part[what] == pytest.approx(whole[what] / 2, rel=0.1), (name, what)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_at_another_number_of_ranks(folder, name, ranks):
    before, run_dir = folder / f"{name}-{3 - ranks}", folder / f"{name}-resumed-{ranks}"
    step = RESUMED[name]
    assert not list(run_dir.glob("error-*"))
    gaps = [abs(a - b) for (_, a), (_, b) in zip(losses(run_dir), losses(before), strict=True)]
    assert gaps[step] <= 1e-6 and max(gaps) <= 1e-4 and len(gaps) == STEPS
    saved = [
        json.loads((newest(run) / "trainer/state.json").read_text()) for run in (run_dir, before)
    ]
    for key in ("step", "cursor", "guard", "config"):
        if key != "guard":
            assert saved[0][key] == saved[1][key]
    orders = [[s["prompt"] for s in state["buffer"]] for state in saved]
    assert orders[0] == orders[1]
    assert_close(newest(run_dir), newest(before), 1e-4)


def test_checkpoints_are_plain_hugging_face_folders(folder):
    for name in NAMES:
        one, two = newest(folder / f"{name}-1"), newest(folder / f"{name}-2")
        files = [{p.relative_to(c).as_posix() for p in c.rglob("*")} for c in (one, two)]
        shards = {f"trainer/shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)}
        assert files[0] ^ files[1] == {"trainer/state.safetensors", *shards}
        model = AutoModelForCausalLM.from_pretrained(two)
        saved = load_file(two / "model.safetensors")
        assert all(torch.equal(model.state_dict()[key], saved[key]) for key in saved)


def refusal(tmp_path: Path, tree: dict) -> dict:
    run_cases(tmp_path, 2, {"case": tree})
    [first, second] = [
        json.loads((tmp_path / "case-2" / f"error-{rank}.json").read_text()) for rank in range(2)
    ]
    assert first["kind"] == second["kind"]
    assert not (tmp_path / "case-2" / "metrics.jsonl").exists()
    return first


def test_more_ranks_than_questions_are_refused(tmp_path):
    error = refusal(tmp_path, settings("critique", rollout={"prompts_per_step": 1}))
    assert "rollout.prompts_per_step = 1" in error["text"] and "2 processes" in error["text"]


def command(run_dir: Path, *flags: str) -> list[str]:
    return [
        *("-m", "--", "fastsd.train", "--run", str(run_dir), "--resume", "auto", "--seeds", "1"),
        *("--condition", "critique", "--teacher.kind", "ema", "--optim.steps", "12"),
        *("--rollout.prompts-per-step", "4", "--rollout.steps-per-batch", "2"),
        *("--checkpoint.every", "1", "--checkpoint.keep", "50", "--eval.questions", "2"),
        *("--eval.samples", "2", "--report.questions", "0", *flags),
    ]


def ranks_of(process: subprocess.Popen) -> list[int]:
    told = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return sorted(map(int, told.stdout.split()))


def weight_files(run_dir: Path) -> dict[str, str]:
    return {n: sha for n, sha in final_state(run_dir).items() if n.endswith(".safetensors")}


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> list[int]:
    """The ranks' process ids once `step` updates are recorded."""
    deadline = time.monotonic() + 120
    file = run_dir / "critique-seed0" / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return ranks_of(process)


@pytest.mark.parametrize("to_all", [False, True])
def test_sigterm_saves_one_checkpoint_and_ends_all_ranks(tmp_path, to_all):
    process = torchrun(
        *command(tmp_path / "run", "--optim.steps", "200", "--checkpoint.every", "0")
    )
    ranks = wait_for_step(tmp_path / "run", 3, process)
    for rank in ranks if to_all else ranks[1:]:
        os.kill(rank, signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert output.count("SIGTERM after update") == 1 and output.count("exitcode  : 143") == 2
    assert len(checkpoints(tmp_path / "run" / "critique-seed0")) == 1


@pytest.mark.slow
def test_a_rank_killed_three_times_ends_with_the_same_weights(tmp_path):
    finished(torchrun(*command(tmp_path / "whole")))
    process = torchrun(*command(tmp_path / "killed"), options=("--max-restarts", "3"))
    for step, rank in ((3, 1), (6, 0), (9, 1)):
        ranks = wait_for_step(tmp_path / "killed", step, process)
        os.kill(ranks[rank], signal.SIGKILL)
        while set(ranks) & set(ranks_of(process)):
            time.sleep(0.05)
    finished(process)
    whole, killed = (tmp_path / name / "critique-seed0" for name in ("whole", "killed"))
    assert losses(killed) == losses(whole)
    assert weight_files(killed) == weight_files(whole)


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 1])
def test_a_hung_rank_ends_the_job_and_leaves_the_checkpoint(tmp_path, hung):
    process = torchrun(*command(tmp_path / "run", "--parallel.timeout-s", "5"))
    ranks = wait_for_step(tmp_path / "run", 3, process)
    os.kill(ranks[hung], signal.SIGSTOP)
    deadline = time.monotonic() + 120  # only ends a hang
    while ranks[1 - hung] in ranks_of(process):
        assert time.monotonic() < deadline, "the other rank waits on"
        time.sleep(0.1)
    output, _ = process.communicate(timeout=240)  # torchrun gives a rank 30 s before SIGKILL
    assert process.returncode == 1
    assert f"rank {1 - hung} of 2: another rank did not answer in phase" in output
    assert checkpoints(tmp_path / "run" / "critique-seed0")
    finished(torchrun(*command(tmp_path / "run")))
