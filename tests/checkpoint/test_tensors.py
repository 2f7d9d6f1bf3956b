"""The trainer's tensors, written by some ranks and read by others: the same bits, or an error."""

import json
import shutil
from pathlib import Path

import pytest
import sharded_checkpoint_worker
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from sharded_checkpoint_worker import save, tensors_of

from fastsd.checkpoint import load_latest
from fastsd.checkpoint.manifest import verify
from fastsd.checkpoint.tensors import SavedTensors, copy_into, write_tensors
from fastsd.errors import CheckpointError
from fastsd.runtime.world import ALONE


def assert_same(saved: SavedTensors, want: dict[str, torch.Tensor]) -> None:
    assert saved.keys() == want.keys()
    for name, tensor in want.items():
        got = saved.whole(name)
        assert (saved[name].dtype, saved[name].shape) == (tensor.dtype, tensor.shape)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Written by one process, by four ranks that read that, by two that read both."""
    folder = tmp_path_factory.mktemp("ranks")
    save(folder / "1-whole", 1, ranks=ALONE)
    save(folder / "1-again", 1, ranks=ALONE)
    for ranks, reads in ((4, ["1-whole"]), (2, ["1-whole", "4-whole", "4-files"])):
        run_ranks(sharded_checkpoint_worker.main, folder, reads, ranks=ranks)
    return folder


def told(folder: Path, ranks: int) -> list[dict]:
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def files(run_dir: Path) -> dict[str, bytes]:
    trainer = run_dir / "checkpoint-1" / "trainer"
    return {path.name: path.read_bytes() for path in trainer.iterdir()}


def test_ranks_read_what_other_numbers_of_ranks_wrote(folder):
    for ranks, reads in ((4, ["1-whole", "own"]), (2, ["1-whole", "4-whole", "4-files", "own"])):
        for answers in told(folder, ranks):
            assert [answers[name] for name in reads] == [[]] * len(reads)


@pytest.mark.parametrize("name", ["1-whole", "2-whole", "2-files", "4-whole", "4-files"])
def test_one_process_reads_what_ranks_wrote(folder, name):
    found = load_latest(folder / name)
    want = tensors_of(1)
    assert_same(found.tensors, want)
    got = {name: torch.full_like(t, 77) for name, t in want.items()}
    found.tensors.read(got)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_every_rank_writes_its_shards_and_nothing_is_a_pickle(folder):
    for ranks in (2, 4):
        whole, more = files(folder / f"{ranks}-whole"), files(folder / f"{ranks}-files")
        assert whole.keys() == {"state.json"} | {
            f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in range(1, ranks + 1)
        }
        assert len(more) > 2 * ranks
        assert {Path(name).suffix for name in more} == {".safetensors", ".json"}
    first, second = (
        load_file(folder / "2-whole/checkpoint-1/trainer" / name)
        for name in sorted(files(folder / "2-whole"))[:2]
    )
    # What every rank has whole is written once.
    assert "torch_rng" in first and not {"torch_rng", "steps", "none"} & set(second)
    assert len(first["optimizer/master"]) == 4 and len(second["optimizer/master"]) == 3


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_state_has_the_same_bytes(folder, ranks):
    assert files(folder / f"{ranks}-whole") == files(folder / f"{ranks}-twice")


def test_a_failure_on_any_rank_is_every_ranks(folder):
    first, second = told(folder, 2)
    for rank in (0, 1):
        kind, text = first[f"full {rank}"]
        assert first[f"full {rank}"] == second[f"full {rank}"] and kind == "CheckpointError"
        place = folder / "2-fails" / "checkpoint-2"
        assert text.startswith(f"could not save {place}: rank {rank}: [Errno 27]")
        assert text.endswith(
            "Earlier checkpoints are intact; free disk space (or lower checkpoint.keep) and "
            "continue with --resume auto"
        )
    for kind, text in (first["elsewhere"], second["elsewhere"]):
        assert kind == "CheckpointError" and "rank 1: " in text
        assert "all ranks must share the run folder" in text
    assert first["well again"][0] == second["well again"][0] == ""
    saved = sorted(path.name for path in (folder / "2-fails").iterdir())
    assert saved == ["checkpoint-1", "checkpoint-2"]
    assert_same(load_latest(folder / "2-fails").tensors, tensors_of(2))
    assert list((folder / "2-elsewhere").iterdir()) == []


def test_a_rank_that_dies_is_lost_and_nothing_is_left(folder):
    first, second = told(folder, 2)
    kind, text = first["dead"]
    assert kind == "RankLost" and "did not answer in phase 'save'" in text
    assert "dead" not in second and list((folder / "2-dead").iterdir()) == []


def test_a_checkpoint_of_one_process_is_kept_if_two_ranks_save_the_same(folder):
    for answers in told(folder, 2):
        assert answers["same"][0] == ""
        assert answers["other"][0] == "CheckpointError" and "not overwritten" in answers["other"][1]
    assert files(folder / "1-again").keys() == {"state.json", "state.safetensors"}


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_shard_is_named(folder, tmp_path, damage):
    path = tmp_path / "checkpoint-1"
    shutil.copytree(folder / "2-whole" / "checkpoint-1", path)
    shard = path / "trainer" / "shard-00002-model-00001-of-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    if damage == "remove":
        shard.unlink()
    wrong = {"flip": "does not match its sha256", "remove": "is missing"}[damage]
    with pytest.raises(CheckpointError, match=f"{path} is not valid: trainer/{shard.name} {wrong}"):
        verify(path)


def test_a_part_has_the_rest_of_the_names(tmp_path):
    tensors = tensors_of(1)
    write_tensors(tmp_path, tensors, ALONE)
    part = SavedTensors(tmp_path).part("optimizer/")
    assert sorted(part) == ["exp_avg", "master"] and len(part) == 2
    assert torch.equal(part.whole("master"), tensors["optimizer/master"])
    into = {"avg": torch.zeros(8, 3, 2)}
    part.part("exp_").read(into)
    assert torch.equal(into["avg"], tensors["optimizer/exp_avg"])
    with pytest.raises(KeyError):
        part["torch_rng"]


def test_tensors_in_memory_are_copied_alike():
    into = {"a": torch.zeros(3)}
    copy_into(into, {"a": torch.arange(3.0), "b": torch.ones(1)})
    assert into["a"].tolist() == [0.0, 1.0, 2.0]


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "state.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=f"cannot read {tmp_path}"):
        SavedTensors(tmp_path)
    with pytest.raises(CheckpointError, match="nothing"):
        SavedTensors(tmp_path / "nothing")
