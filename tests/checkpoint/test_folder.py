"""Checkpoints under kills, bit flips, truncations, missing files and full disks."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from written_checkpoints import FORK, assert_holds, save, state_of, tensors_of, write_light_model

from fastsd.checkpoint import checkpoints, load_latest, save_checkpoint
from fastsd.checkpoint.manifest import verify
from fastsd.config.sections import LoraConfig, ModelConfig
from fastsd.errors import CheckpointError
from fastsd.runtime.world import World


def warnings_in(caplog):
    """Ours: torch's checkpointing has a logger of its own, which pytest may listen to."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_round_trip_and_layout(tmp_path):
    path = save(tmp_path, 10)
    assert path == tmp_path / "checkpoint-10"
    names = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    trainer = {"trainer/state.safetensors", "trainer/state.json"}
    assert names == {"config.json", "model.safetensors", "MANIFEST.json"} | trainer
    assert_holds(load_latest(tmp_path), 10)
    assert load_latest(tmp_path / "nothing") is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]


def test_rotation_keeps_the_newest_by_number(tmp_path):
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [11, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_rotation_waits_for_the_new_one_to_verify(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    real_rename = os.rename

    def rename_then_damage(source, target):
        real_rename(source, target)
        (Path(target) / "trainer/state.json").write_text("{}")

    monkeypatch.setattr(os, "rename", rename_then_damage)
    with pytest.raises(CheckpointError, match="checkpoint-2 is not valid: trainer/state.json"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert_holds(load_latest(tmp_path), 1)


def test_never_overwrites(tmp_path):
    path = save(tmp_path, 1)
    before = (path / "MANIFEST.json").stat().st_ino
    assert save(tmp_path, 1) == path
    assert (path / "MANIFEST.json").stat().st_ino == before
    with pytest.raises(CheckpointError, match="not overwritten"):
        save_checkpoint(tmp_path, 1, write_light_model, tensors_of(2), state_of(1), 3)
    # A signal that arrives after the same step's rollouts: the state on disk will do.
    assert save_checkpoint(tmp_path, 1, write_light_model, tensors_of(1), state_of(9), 3) == path
    assert_holds(load_latest(tmp_path), 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_after_a_fall_back_the_damaged_one_makes_room(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3/trainer/state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert_holds(load_latest(tmp_path), 2)
    assert warnings_in(caplog) == [
        f"checkpoint {tmp_path / 'checkpoint-3'} is not valid: trainer/state.json is missing; "
        "trying the checkpoint before it"
    ]
    save(tmp_path, 3, keep=1)
    assert_holds(load_latest(tmp_path), 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-3.damaged1"]


def test_rotation_spares_the_one_just_saved_below_a_damaged_one(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoint-10/MANIFEST.json").unlink()
    save(tmp_path, 6, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 6]
    assert_holds(load_latest(tmp_path), 6)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        load_latest(tmp_path)
    assert CheckpointError.exit_code == 5


@pytest.mark.parametrize("cases", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_corruption_is_found_and_falls_back(tmp_path, cases, caplog):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    pristine = tmp_path / "pristine"
    shutil.copytree(path, pristine)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    rng = random.Random(0)
    for case in range(cases):
        name = names[case % len(names)]
        damage = ("flip", "truncate", "remove", "flip", "extend", "flip")[case // len(names) % 6]
        raw = bytearray((pristine / name).read_bytes())
        if damage == "flip":
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif damage == "truncate":
            # One byte less is the case a lenient reader forgives.
            del raw[rng.choice([len(raw) - 1, rng.randrange(len(raw))]) :]
        elif damage == "extend":
            raw += b"\n"
        (path / name).write_bytes(raw)
        if damage == "remove":
            (path / name).unlink()
        with pytest.raises(CheckpointError, match="is not valid"):
            verify(path)
        if case % 10 == 0:
            caplog.clear()
            assert_holds(load_latest(tmp_path), 1)
            assert len(warnings_in(caplog)) == 1
        shutil.copyfile(pristine / name, path / name)
    assert_holds(load_latest(tmp_path), 2)


def test_pickles_are_neither_written_nor_read(tmp_path):
    save(tmp_path, 1)

    def with_pickle(folder):
        write_light_model(folder)
        (folder / "training_args.bin").write_bytes(b"\x80\x04.")

    with pytest.raises(CheckpointError, match="training_args.bin: a pickle"):
        save_checkpoint(tmp_path, 2, with_pickle, {}, {}, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    path = save(tmp_path, 2)
    (path / "trainer" / "optimizer.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"trainer/optimizer.pt, and pickles are never read"):
        verify(path)
    assert_holds(load_latest(tmp_path), 1)


def test_a_file_that_is_not_in_the_manifest_is_not_read(tmp_path):
    """Tensors are read from all files of the folder."""
    path = save(tmp_path, 1)
    shutil.copyfile(path / "trainer/state.safetensors", path / "trainer/more.safetensors")
    with pytest.raises(CheckpointError, match=r"trainer/more.safetensors is not in MANIFEST.json"):
        verify(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1.0, float("nan")]}, r"state.a\[1\] is nan"),
        ({"a": {"b": float("-inf")}}, r"state.a.b is -inf"),
        ({"a": {3: 1}}, r"state.a has the key 3"),
        ({"a": torch.zeros(1)}, r"state.a is a Tensor"),
        ({"a": b"x"}, r"state.a is a bytes"),
    ],
)
def test_state_that_json_cannot_hold_is_refused(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 1, write_light_model, {}, state, 1)
    assert checkpoints(tmp_path) == []


def test_shared_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"a": base, "b": base[1], "c": base.t(), "d": base.view(-1), "e": torch.tensor(3.0)}
    save_checkpoint(tmp_path, 1, write_light_model, tensors, {}, 1)
    loaded = load_latest(tmp_path)
    assert all(torch.equal(loaded.tensors.whole(name), tensors[name]) for name in tensors)


def test_full_disk_simulated_at_every_sync(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real_sync, calls, fail_at = os.fsync, [0], [0]

    def full(descriptor):
        calls[0] += 1
        if calls[0] == fail_at[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    # 5 files, 2 folders; the eighth syncs the run folder, after the rename.
    for fail_at[0] in range(1, 8):
        calls[0] = 0
        with pytest.raises(CheckpointError, match="No space left on device.*intact"):
            save(tmp_path, 2)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    fail_at[0] = 0
    assert_holds(load_latest(tmp_path), 1)
    save(tmp_path, 2)
    assert_holds(load_latest(tmp_path), 2)


def save_with_file_limit(run, limit, report):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(run, 2)
        report.send("saved")
    except CheckpointError as error:
        report.send(f"refused: {error}")


@pytest.mark.parametrize("limit", [10, 100, 600, 5_000, 10_000, 60_000])
def test_writes_that_fail_for_real(tmp_path, limit):
    """A file size limit makes Python's and safetensors' own writes fail as a full disk does."""
    save(tmp_path, 1)
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=save_with_file_limit, args=(tmp_path, limit, sender))
    child.start()
    assert receiver.poll(30)
    assert receiver.recv().startswith("refused: could not save")
    child.join()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert_holds(load_latest(tmp_path), 1)


def test_full_tmpfs(tmp_path):
    """A real ENOSPC: a file system of 224 KiB holds two checkpoints but not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=224k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        save(disk, 1)
        save(disk, 2)
        with pytest.raises(CheckpointError, match="No space left on device|os error 28"):
            save(disk, 3)
        assert sorted(p.name for p in disk.iterdir()) == ["checkpoint-1", "checkpoint-2"]
        assert_holds(load_latest(disk), 2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])])
def test_is_a_hugging_face_folder(tmp_path, lora):
    from tiny_models import build_tiny_llama
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastsd.model import load_policy

    build_tiny_llama(tmp_path / "base")
    config = ModelConfig(name=str(tmp_path / "base"), lora=lora)
    policy = load_policy(config, "cpu", torch.float32)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    path = save_checkpoint(tmp_path / "run", 3, policy.save, {}, {}, 1)
    shutil.rmtree(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        found, wanted = loaded(ids).logits, policy.model(ids).logits
    # A merged adapter rounds differently: W + BA at once instead of Wx + B(Ax), sums of 100 terms.
    tolerance = 0.0 if lora is None else 100 * 2**-23 * wanted.abs().max().item()
    assert (found - wanted).abs().max().item() <= tolerance
    again = AutoTokenizer.from_pretrained(path)
    assert again.chat_template == policy.tokenizer.chat_template
    assert again.get_vocab() == policy.tokenizer.get_vocab()
    verify(path)


class OtherFolder(World):
    """Two ranks in the eyes of the first; the other sees another folder."""

    def __init__(self, seen):
        super().__init__(size=2)
        self.seen = seen

    def gather(self, value):
        return [value, self.seen]

    def together(self, work):
        return [work()]


@pytest.mark.parametrize("seen", [{}, {"checkpoint-3": "another"}])
def test_ranks_that_see_other_checkpoints_are_refused(tmp_path, seen):
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="finds checkpoint-3 there, rank 1 .*one that all"):
        load_latest(tmp_path, OtherFolder(seen))
