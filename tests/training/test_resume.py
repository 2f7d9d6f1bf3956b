"""A resumed run equals the uninterrupted one, bit for bit: weights, optimizer, teacher, losses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT
from small_runs import LORA, final_state, losses, run_small, small_config

import fastsd.training.session
from fastsd.checkpoint import checkpoints
from fastsd.errors import CheckpointError, FastsdError, Interrupted
from fastsd.training.optimizer import Optimizer
from fastsd.training.session import Session

CONDITIONS = ("grpo", "reference", "critique")
TEACHERS = ("live", "ema", "frozen", "adapter_off")


def mid_everything(condition: str, teacher: str, **more):
    """Two steps per batch of rollouts (resume mid-buffer), several micro-batches per step."""
    lora = {"lora": LORA} if teacher == "adapter_off" else {}
    return small_config(
        condition,
        teacher={"kind": teacher},
        model=lora,
        rollout={"prompts_per_step": 3, "samples_per_prompt": 4, "steps_per_batch": 2},
        loss={"policy_weight": 0.5} if condition == "critique" else {},
        **more,
    )


def cut_back(source: Path, target: Path, step: int) -> Path:
    """What the folder of `source` looked like when checkpoint `step` was its newest."""
    shutil.copytree(source, target)
    for saved, path in checkpoints(target):
        if saved > step:
            shutil.rmtree(path)
    return target


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_resume_is_exact_mid_buffer_and_between_batches(condition, teacher, tmp_path):
    whole = run_small(mid_everything(condition, teacher), tmp_path / "whole")
    want, want_losses = final_state(whole), losses(whole)
    assert len(want_losses) == 6 and len({loss for _, loss in want_losses}) > 1
    for step in (1, 4):
        cut = cut_back(whole, tmp_path / f"from-{step}", step)
        run_small(mid_everything(condition, teacher, resume="auto"), cut)
        got = final_state(cut)
        assert got == want
        assert losses(cut) == want_losses


def test_a_finished_run_resumes_to_itself(tmp_path):
    config = small_config("critique", optim={"steps": 2})
    run = run_small(config, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    run_small(config.model_copy(update={"resume": "auto"}), run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def test_other_settings_are_refused_by_name(tmp_path):
    run = run_small(small_config("critique", optim={"steps": 1}), tmp_path / "run")
    other = small_config("critique", resume="auto", optim={"steps": 1, "lr": 1.0})
    with pytest.raises(
        CheckpointError, match=r"cannot resume .*\[optim\] was .*0.0003.* and is .*1.0"
    ):
        Session(other, run).restore()


def test_a_damaged_newest_checkpoint_falls_back_and_still_ends_the_same(tmp_path, caplog):
    config = small_config("reference", teacher={"kind": "ema"})
    whole = run_small(config, tmp_path / "whole")
    cut = cut_back(whole, tmp_path / "cut", 4)
    weights = cut / "checkpoint-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    run_small(config.model_copy(update={"resume": "auto"}), cut)
    assert "checkpoint-4" in caplog.text and losses(cut) == losses(whole)
    assert final_state(cut)["model.safetensors"] == final_state(whole)["model.safetensors"]


COMMON = [
    *("--seeds", "1", "--optim.steps", "12", "--rollout.prompts-per-step", "4"),
    *("--rollout.steps-per-batch", "2", "--checkpoint.every", "1", "--checkpoint.keep", "50"),
    *("--eval.questions", "2", "--eval.samples", "2"),
]
CRITIQUE_EMA = ("critique", "ema")


def launch(run_dir: Path, pair: tuple[str, str], *flags: str) -> subprocess.Popen:
    condition, teacher = pair
    lora = ["--model.lora.r", str(LORA["r"]), "--model.lora.alpha", str(LORA["alpha"])]
    lora += ["--model.lora.target-modules", *LORA["target_modules"]]
    command = [
        *(sys.executable, "-m", "fastsd.train", "--run", str(run_dir), "--resume", "auto"),
        *("--condition", condition, "--teacher.kind", teacher, *COMMON),
        *(lora if teacher == "adapter_off" else []),
        *flags,
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> bool:
    """True once `step` updates are recorded, False when the process ended before."""
    deadline = time.monotonic() + 240
    while process.poll() is None:
        assert time.monotonic() < deadline, f"no step {step} in {run_dir}"
        found = list(run_dir.glob("*-seed0/metrics.jsonl"))
        if found and len(found[0].read_text().splitlines()) >= step:
            return True
        time.sleep(0.01)
    return False


def finish(run_dir: Path, pair: tuple[str, str]) -> str:
    process = launch(run_dir, pair)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def assert_same_end(run_dir: Path, output: str, whole: Path, whole_output: str) -> None:
    got, want = (json.loads(text.splitlines()[-1]) for text in (output, whole_output))
    assert got["avg_at_2"] == want["avg_at_2"] and got["ci95"] == want["ci95"]
    [ours], [theirs] = run_dir.glob("*-seed0"), whole.glob("*-seed0")
    for name in ("model.safetensors", "trainer/state.safetensors"):
        assert final_state(ours)[name] == final_state(theirs)[name]
    assert losses(ours) == losses(theirs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, finish(run_dir, CRITIQUE_EMA)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave_with_their_code(signum, code, tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    process = launch(run_dir, CRITIQUE_EMA, "--checkpoint.every", "0")
    assert wait_for_step(run_dir, 3, process), process.communicate()[0]
    sent = time.monotonic()
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert time.monotonic() - sent < 10, "left late"
    assert "saved" in output and checkpoints(run_dir / "critique-seed0")
    assert_same_end(run_dir, finish(run_dir, CRITIQUE_EMA), *uninterrupted)


def kill(run_dir: Path, pair: tuple[str, str], rng: random.Random) -> None:
    process = launch(run_dir, pair)
    if wait_for_step(run_dir, rng.randrange(1, 11), process):
        time.sleep(rng.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), output


def test_kills_at_random_moments(tmp_path, uninterrupted):
    rng = random.Random(0)
    for _ in range(2):
        kill(tmp_path / "run", CRITIQUE_EMA, rng)
    assert_same_end(tmp_path / "run", finish(tmp_path / "run", CRITIQUE_EMA), *uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_kills_at_random_moments_everywhere(condition, teacher, tmp_path):
    pair, rng = (condition, teacher), random.Random(f"{condition}/{teacher}")
    whole_output = finish(tmp_path / "whole", pair)
    for _ in range(3):
        kill(tmp_path / "run", pair, rng)
    output = finish(tmp_path / "run", pair)
    assert_same_end(tmp_path / "run", output, tmp_path / "whole", whole_output)


def test_a_signal_while_weights_move_waits_until_the_step_is_on_record(tmp_path):
    config = small_config("critique", optim={"steps": 3})
    whole = run_small(config, tmp_path / "whole")
    run_dir = tmp_path / "run"
    step = Optimizer.step

    def interrupted_step(optimizer):
        result = step(optimizer)
        if optimizer.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(Optimizer, "step", interrupted_step)
        run_small(config, run_dir)
    assert stopped.value.exit_code == 143
    assert [step for step, _ in losses(run_dir)] == [1, 2]
    run_small(config.model_copy(update={"resume": "auto"}), run_dir)
    assert losses(run_dir) == losses(whole) and final_state(run_dir) == final_state(whole)


def test_bad_input_in_the_middle_keeps_the_finished_updates(tmp_path):
    config = small_config("critique", optim={"steps": 3}, checkpoint={"every": 0, "keep": 2})
    whole = run_small(config, tmp_path / "whole")
    run_dir = tmp_path / "run"
    collect = fastsd.training.session.collect

    def failing_collect(session):
        if session.step == 2:
            raise FastsdError("the critic's text is too long")
        return collect(session)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FastsdError, match="too long"):
        patch.setattr(fastsd.training.session, "collect", failing_collect)
        run_small(config, run_dir)
    assert [step for step, _ in checkpoints(run_dir)] == [2]
    run_small(config.model_copy(update={"resume": "auto"}), run_dir)
    assert losses(run_dir) == losses(whole)


def test_a_second_signal_does_not_break_the_save(tmp_path):
    config = small_config("critique", optim={"steps": 3}, checkpoint={"every": 0, "keep": 2})
    save = Session.save

    def saved_under_fire(session):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(session)

    def interrupted_collect(session):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Session, "save", saved_under_fire)
        patch.setattr(fastsd.training.session, "collect", interrupted_collect)
        run_small(config, tmp_path / "run")
    assert checkpoints(tmp_path / "run")
