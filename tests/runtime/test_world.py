"""Ranks: what fails on one is raised on all, one that does not answer ends the others' wait, and
they speak with one voice."""

import contextlib
import json
import runpy
import signal

import pytest
import torch.distributed as dist
from ranks import run_ranks
from sharded_run_worker import world_cases

from fastsd.config import load_config
from fastsd.errors import FastsdError, Interrupted, RankLost
from fastsd.runtime import world
from fastsd.runtime.program import run_main
from fastsd.runtime.signals import SignalGate
from fastsd.runtime.world import ALONE, World, guarded, open_world


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    run_ranks(world_cases, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_values_come_in_the_order_of_ranks(answers):
    for answer in answers:
        assert answer["gather"] == ["", "[0, 10]"]
        assert answer["lead"] == ["", "from 0"]


def test_an_error_on_one_rank_is_raised_on_all_with_its_class(answers):
    own, others = answers[1]["fastsd"], answers[0]["fastsd"]
    assert own == ["CriticUnavailable", "no reply"]
    assert others == ["CriticUnavailable", "rank 1: no reply"]
    assert answers[0]["config"][0] == "ConfigError" and "b: wrong" in answers[0]["config"][1]


def test_a_defect_stays_one_where_it_is_and_ends_the_other(answers):
    assert answers[0]["defect"] == ["ValueError", "a defect"]
    assert answers[1]["defect"] == ["FastsdError", "rank 0: ValueError: a defect"]
    assert answers[0]["lead fails"][0] == "ZeroDivisionError"
    assert answers[1]["lead fails"][0] == "FastsdError"
    assert answers[0]["both"][0] == "IndexError" and "rank 0: IndexError" in answers[1]["both"][1]


@pytest.mark.parametrize("case", ["signalled", "signalled_alone"])
def test_a_signal_to_one_rank_stops_all(answers, case):
    assert [answer[case] for answer in answers] == [["Interrupted", "SIGTERM"]] * 2


def test_a_rank_that_does_not_answer_ends_the_wait_with_what_to_do(answers):
    kind, text = answers[0]["hung"]
    assert kind == "RankLost"
    for part in ("rank 0 of 2", "in phase 'test'", "parallel.timeout_s = 2 s", "--resume auto"):
        assert part in text


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = open_world(1.0)
    assert world is ALONE and world.leads and world.size == 1 and world.local_rank is None
    assert world.together(lambda: 3) == [3] and world.lead(lambda: 4) == 4
    with pytest.raises(ZeroDivisionError):
        world.lead(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="gloo"), guarded():
        raise RuntimeError("gloo in a message is not a lost rank where there is no other")


@pytest.mark.parametrize("rank", [None, "one"])
def test_half_of_torchruns_environment_is_refused(monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(FastsdError, match=r"WORLD_SIZE is set, but RANK.*torchrun"):
        open_world(1.0)


def test_torchrun_with_one_rank_is_one_process(monkeypatch):
    monkeypatch.setattr("fastsd.runtime.world._opened", [])
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert open_world(1.0).gather("x") == ["x"]


def test_the_gate_of_one_process_stays_as_it_is():
    with SignalGate(ALONE) as gate, pytest.raises(Interrupted):
        with gate.opened():
            gate.agree()
        signal.raise_signal(signal.SIGTERM)


def test_a_rank_that_is_ending_takes_no_second_signal():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted), SignalGate(World(0, 2)):
            raise Interrupted(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_program_of_one_process_is_refused_under_torchrun(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    called = []
    assert run_main(lambda: called.append(1)) == 2
    assert "started this program 2 times" in capsys.readouterr().err and not called
    assert run_main(lambda: called.append(1), many=True) == 0 and called == [1]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_main(lambda: None) == 0


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("evaluate", ["chain_sum", "--eval.questions", "1"]),
        ("data", ["filter", "--out", "kept.jsonl"]),
        ("advantage", ["chain_sum", "rows.jsonl"]),
        ("report", ["a-run"]),
        ("plan", ["--hardware", "8xH100"]),
        ("doctor", []),
    ],
)
def test_every_such_program_says_to_start_it_without_torchrun(
    module, words, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", [module, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"fastsd.{module}", run_name="__main__")
    assert ended.value.code == 2
    assert "with python instead of torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_machines_other_ranks_waits_for_its_first(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("fastsd.runtime.program.time.sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)
    for rank, count in (("0", 0), ("1", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run_main(lambda: load_config(["no.toml"]) and None, many=True) == 2
        assert len(waited) == count and "no.toml" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("error", "left"),
    [(None, True), (FastsdError("x"), True), (Interrupted(15), True), (RankLost("x"), False)],
)
def test_ranks_part_in_order_but_from_lost_ones(monkeypatch, tmp_path, error, left):
    monkeypatch.setattr(world, "_opened", [World(size=2)])
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with contextlib.suppress(BaseException), world.left_in_order():
            if error is not None:
                raise error
        assert dist.is_initialized() != left and bool(world._opened) != left
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
