"""The trainer's state, one tensor at a time: a safetensors file like any other, or none at all."""

import pytest
import torch
from safetensors.torch import load_file

from fastsd.sharded_checkpoint import SavedTensors, write_state
from fastsd.types import CheckpointError
from fastsd.world import ALONE

TENSORS = {
    "teacher/b": torch.randn(3, 5).bfloat16(),
    "torch_rng": torch.arange(7, dtype=torch.uint8),
    "optimizer/a.weight": torch.randn(4, 2, 3),
    "optimizer/none": torch.randn(0, 3),
    "optimizer/scalar": torch.tensor(2.5, dtype=torch.float64),
    "optimizer/view": torch.randn(6, 4).T[1:],
}


def test_what_is_written_is_read_back_whole_and_one_by_one(tmp_path):
    path = write_state(tmp_path / "new" / "state.safetensors", TENSORS, ALONE)
    saved = SavedTensors(path)
    assert load_file(path).keys() == TENSORS.keys() == set(saved)
    for name, want in TENSORS.items():
        for got in (load_file(path)[name], saved[name]):
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_a_part_has_the_rest_of_the_names(tmp_path):
    part = SavedTensors(write_state(tmp_path / "s", TENSORS, ALONE)).part("optimizer/")
    assert sorted(part) == ["a.weight", "none", "scalar", "view"] and len(part) == 4
    assert torch.equal(part["a.weight"], TENSORS["optimizer/a.weight"])
    assert sorted(part.part("a.")) == ["weight"]
    with pytest.raises(KeyError):
        part["torch_rng"]


def test_a_file_that_cannot_be_written_leaves_none(tmp_path, monkeypatch):
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not save .*folder.*--resume auto"):
        write_state(tmp_path / "folder" / "s", TENSORS, ALONE)
    gathered = []

    def full_disk(tensor):
        gathered.append(tensor)
        if len(gathered) == 2:
            raise OSError(28, "No space left on device")
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()

    monkeypatch.setattr("fastsd.sharded_checkpoint._bytes", full_disk)
    asked = []
    monkeypatch.setattr("fastsd.sharded_checkpoint.whole", lambda t: asked.append(t) or t)
    with pytest.raises(CheckpointError, match="No space left"):
        write_state(tmp_path / "s", TENSORS, ALONE)
    assert not (tmp_path / "s").exists()
    assert len(asked) == len(TENSORS)  # the other ranks' part of each gather was still asked for
