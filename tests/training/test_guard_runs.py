"""Guards in real runs: what is skipped changes nothing, a stop leaves a checkpoint that goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil

import pytest
import torch
from small_runs import final_state, losses, run_small, small_config

import fastsd.training.loss
from fastsd.checkpoint import checkpoints
from fastsd.errors import TrainingDiverged
from fastsd.train import update
from fastsd.training.guards import SIGNS, Collapsed, Guard
from fastsd.training.session import Session


def cut_back(source, target, step):
    """The run as it was when checkpoint `step` was its newest."""
    shutil.copytree(source, target)
    for saved, path in checkpoints(target):
        if saved > step:
            shutil.rmtree(path)
    return target


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(session):
    """SHA-256 of weights, optimizer and teacher."""
    tensors = dict(session.policy.model.named_parameters()) | session.optimizer.state_tensors()
    tensors |= {f"average/{n}": t for n, t in session.teacher.state_tensors().items()}
    tensors |= {f"teacher/{n}": t for n, t in session.teacher.policy.model.named_parameters()}
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def bad_loss_head(real, when):
    """The loss head, but where `when()` gives a number and a way, the loss is bad in that way."""

    def loss_head(*arguments):
        out = real(*arguments)
        bad, way = when()
        change = {"none": out.loss, "loss": out.loss + bad, "both": out.loss * bad}
        return dataclasses.replace(out, loss=change[way])

    return loss_head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bad_loss_or_gradient_leaves_weights_moments_and_the_ema_teacher(
    dtype, tmp_path, monkeypatch
):
    config = small_config("critique", teacher={"kind": "ema"}, model={"dtype": dtype})
    session, way = Session(config, tmp_path), [0.0, "none"]
    monkeypatch.setattr(
        "fastsd.training.loss.loss_head", bad_loss_head(fastsd.training.loss.loss_head, lambda: way)
    )
    seen = [state_of(session)]
    for bad in (math.nan, math.inf, -math.inf):
        for kind in ("loss", "both"):
            way[:] = 0.0, "none"
            assert update(session, session.next_samples()).metrics()["skipped"] == 0.0
            before = state_of(session)
            way[:] = bad, kind
            metrics = update(session, session.next_samples()).metrics()
            assert metrics["skipped"] == metrics["guard/nonfinite"] == 1.0
            assert metrics["guard/spike"] == 0.0
            assert math.isfinite(metrics["grad_norm"]) == (kind == "loss")
            assert state_of(session) == before != seen[-1]
            seen.append(before)
    assert session.optimizer.nonfinite_steps == 6 and session.step == 12


def test_five_bad_losses_stop_with_a_checkpoint_that_goes_on(tmp_path, monkeypatch):
    config = small_config(
        "critique", teacher={"kind": "ema"}, optim={"steps": 8}, checkpoint={"every": 0}
    )
    real, calls = fastsd.training.loss.loss_head, []

    def from_the_third():
        calls.append(1)
        return (math.nan, "loss") if len(calls) > 2 else (0.0, "none")

    with monkeypatch.context() as patch, pytest.raises(TrainingDiverged, match=r"the loss \(nan\)"):
        patch.setattr("fastsd.training.loss.loss_head", bad_loss_head(real, from_the_third))
        run_small(config, tmp_path / "run")
    assert TrainingDiverged.exit_code == 4
    [(step, _)] = checkpoints(tmp_path / "run")
    assert step == 6
    session = Session(config, tmp_path / "run")
    assert session.restore()
    assert session.optimizer.calls == 6 and session.optimizer.nonfinite_in_a_row == 4
    run_small(config.model_copy(update={"resume": "auto"}), tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9))


def test_skipped_spikes_resume_bit_for_bit(tmp_path):
    """A strict rule in a short window skips now and then; the resumed run skips the same ones."""
    guard = {"spike_sigma": 0.7, "spike_window": 16}
    more = {"guard": guard, "optim": {"steps": 26}, "teacher": {"kind": "ema"}}
    whole = run_small(small_config("critique", **more), tmp_path / "whole")
    lines = records(whole)
    spikes = [line["step"] for line in lines if line["guard/spike"]]
    assert [line["step"] for line in lines if line["skipped"]] == spikes
    assert spikes and min(spikes) > 16
    cut = cut_back(whole, tmp_path / "cut", 18)
    run_small(small_config("critique", resume="auto", **more), cut)
    assert final_state(cut) == final_state(whole) and losses(cut) == losses(whole)


@pytest.fixture
def short_from_the_ninth(monkeypatch):
    """Answers seem to have one token from update 9 on."""
    observe = Guard.observe

    def collapsing(guard, step, metrics, rollouts):
        changed = metrics | ({"length/mean": 1.0, "reward/mean": 0.0} if step >= 9 else {})
        return observe(guard, step, changed, rollouts)

    monkeypatch.setattr(Guard, "observe", collapsing)


def collapsing_config(**more):
    return small_config("grpo", optim={"steps": 14}, checkpoint={"every": 0, "keep": 50}, **more)


def test_a_collapse_stops_with_a_checkpoint_and_goes_on_with_warn(
    short_from_the_ninth, tmp_path, capsys
):
    run = tmp_path / "run"
    with pytest.raises(Collapsed) as stopped:
        run_small(collapsing_config(), run)
    assert stopped.value.exit_code == 4 and [step for step, _ in checkpoints(run)] == [11]
    text = str(stopped.value)
    for part in ("length/mean was 1, 1, 1 in updates 9 to 11", "19", "--guard.collapse warn"):
        assert part in text
    assert [line["step"] for line in records(run)] == list(range(1, 12))
    assert [line["guard/collapse_length"] for line in records(run)] == [0.0] * 10 + [1.0]
    with pytest.raises(Collapsed):  # with the same setting it stops at once
        run_small(collapsing_config(resume="auto"), run)
    capsys.readouterr()
    run_small(collapsing_config(resume="auto", guard={"collapse": "warn"}), run)
    assert capsys.readouterr().out.count("sign of collapse, length") == 1
    assert len(records(run)) == 14 and records(run)[-1]["guard/collapse_length"] == 1.0


def test_warn_says_it_once_and_resumes_bit_for_bit(short_from_the_ninth, tmp_path, capsys):
    more = {"guard": {"collapse": "warn"}, "optim": {"steps": 14}}
    whole = run_small(small_config("grpo", **more), tmp_path / "whole")
    assert capsys.readouterr().out.count("sign of collapse") == 1
    cut = cut_back(whole, tmp_path / "cut", 12)
    capsys.readouterr()
    run_small(small_config("grpo", resume="auto", **more), cut)
    assert "sign of collapse" not in capsys.readouterr().out
    assert final_state(cut) == final_state(whole)


def test_off_neither_stops_nor_says_anything(short_from_the_ninth, tmp_path, capsys):
    run = run_small(collapsing_config(guard={"collapse": "off"}), tmp_path / "run")
    assert "collapse" not in capsys.readouterr().out
    assert not [name for name in records(run)[-1] if name.startswith("guard/collapse")]
    assert {"guard/spike", "guard/nonfinite", *SIGNS.values()} <= records(run)[-1].keys()
