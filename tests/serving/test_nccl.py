"""vLLM's weight transfer: who is called in which order, and servers that fail at it.

The servers are `fake_vllm`'s and the wire is memory, but the calls are those of vLLM's engine.
"""

import errno
import importlib.util
import os
import signal
import socket
import threading
import time
from importlib.machinery import ModuleSpec

import pytest
import torch
from fake_transfer import MemoryEngine
from fake_vllm import FIXTURES, PROMPTS, TRANSFER_PATHS, open_tiny
from tiny_models import build_tiny

import fastsd.serving.nccl_group
from fastsd.config.sections import RolloutConfig
from fastsd.errors import Interrupted
from fastsd.runtime.signals import SignalGate
from fastsd.serving.fleet import Fleet
from fastsd.serving.nccl import WeightTransfer, _meeting_place, choose_sync, open_nccl
from fastsd.serving.server import RolloutError, RolloutUnavailable

folder, policy, serve = FIXTURES

GPU = torch.device("cuda")


def open_transfer(policy, place, servers, *, timeout_s=30.0, **options):
    """A sampler whose weights go through memory."""
    sampler = open_tiny(policy, place, servers, timeout_s=timeout_s, **options)
    sampler.sync = WeightTransfer(policy, timeout_s, MemoryEngine.open)
    return sampler


def change_weights(policy):
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)


def calls(server) -> list[str]:
    """What it was told of a transfer, after the weights were asked about."""
    told = (*TRANSFER_PATHS, "/reset_prefix_cache", "/update_weight_version")
    return [path.removeprefix("/") for path, _ in server.requests if path in told]


UPDATE = ["start_weight_update", "update_weights", "finish_weight_update"]
MARKED = [*UPDATE, "reset_prefix_cache", "update_weight_version"]
MEETING = ["shutdown_weight_transfer_engine", "init_weight_transfer_engine"]
OPENED = ["update_weight_version"]


def test_all_servers_are_called_as_one(policy, serve, tmp_path):
    """Ranks after each other's workers, one group for several updates, versions, the probe."""
    servers = [serve(workers=2), serve()]
    sampler = open_transfer(policy, tmp_path, servers)
    assert "weights by NCCL" in sampler.name
    for version in (0, 1, 1):
        sampler.update_weights(version)
        assert sampler.metrics()["rollout/probe_gap"] < 1e-4
        change_weights(policy) if version == 0 else None
    for server, offset in zip(servers, (1, 3), strict=True):
        assert calls(server) == [*OPENED, *MEETING, *MARKED, *MARKED]
        [init] = server.asked("/init_weight_transfer_engine")
        assert init["init_info"]["rank_offset"] == offset and init["init_info"]["world_size"] == 4
        assert server.asked("/collective_rpc") == []
        marks = [body["new_version"] for body in server.asked("/update_weight_version")]
        assert [mark.rpartition("-")[0] for mark in marks[1:]] == ["fastsd-0", "fastsd-1"]
    names = [update["update_info"]["names"] for update in servers[0].asked("/update_weights")]
    assert names[0] == names[1] and "lm_head.weight" in names[0]
    assert not (tmp_path / "served").exists(), "no files"
    rollouts = sampler.sample(PROMPTS, 2, key=(1,))
    assert len(rollouts) == 2 * len(PROMPTS)


def test_a_restarted_server_makes_a_new_group(policy, serve, tmp_path):
    servers = [serve(), serve()]
    sampler = open_transfer(policy, tmp_path, servers)
    sampler.update_weights(0)
    servers[1].restart()
    change_weights(policy)
    sampler.update_weights(1)
    assert [len(s.asked("/init_weight_transfer_engine")) for s in servers] == [2, 2]
    assert sampler.metrics()["rollout/servers"] == 2
    assert sampler.metrics()["rollout/probe_gap"] < 1e-4


def drops(call):
    return lambda path, body: "drop" if path == f"/{call}" else None


def fails(call):
    return lambda path, body: (500, b"CUDA error") if path == f"/{call}" else None


STAGES = ["init_weight_transfer_engine", *UPDATE]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", [drops, fails])
def test_a_server_that_fails_leaves_the_weights_to_the_others(
    policy, serve, tmp_path, stage, fault
):
    """And comes back into a new group; `servers[0]` gets both versions."""
    servers = [serve(), serve()]
    sampler = open_transfer(policy, tmp_path, servers)
    sampler.update_weights(0)
    servers[1].faults = fault(stage)
    if stage == STAGES[0]:
        servers[1].restart()
    change_weights(policy)
    sampler.update_weights(1)
    assert sampler.metrics()["rollout/servers"] == 1
    assert [not server.lost for server in sampler.fleet.servers] == [True, False]
    assert sampler.metrics()["rollout/probe_gap"] < 1e-4
    servers[1].faults = lambda path, body: None
    sampler.update_weights(2)
    assert sampler.metrics()["rollout/servers"] == 2
    assert sampler.metrics()["rollout/probe_gap"] < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_no_server_left_ends_the_run_resumably(policy, serve, tmp_path, stage):
    servers = [serve(), serve()]
    sampler = open_transfer(policy, tmp_path, servers)
    for server in servers:
        server.faults = drops(stage)
    with pytest.raises(RolloutUnavailable, match=f"took the new weights: .*/{stage}: ") as stop:
        sampler.update_weights(0)
    assert stop.value.exit_code == 3 and all(s.url in str(stop.value) for s in servers)
    assert sampler.version is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_never_answers_is_lost_in_time(policy, serve, tmp_path, stage, monkeypatch):
    monkeypatch.setattr(fastsd.serving.nccl_group, "GRACE_S", 0.3)
    server, release = serve(), threading.Event()
    sampler = open_transfer(policy, tmp_path, [server], timeout_s=0.7)
    server.faults = lambda path, body: path == f"/{stage}" and release.wait(20) and "drop"
    start = time.monotonic()
    with pytest.raises(RolloutUnavailable, match=f"/{stage} gave no whole reply"):
        sampler.update_weights(0)
    assert time.monotonic() - start < 5
    release.set()


def test_who_still_waits_for_a_dead_server_is_lost_too(policy, serve, tmp_path, monkeypatch):
    """A worker that hangs inside NCCL is not woken by the trainer's leaving."""
    monkeypatch.setattr(fastsd.serving.nccl_group, "GRACE_S", 0.3)
    servers, release = [serve(), serve(), serve()], threading.Event()
    sampler = open_transfer(policy, tmp_path, servers)
    servers[1].faults = drops("update_weights")
    servers[2].faults = lambda path, body: (
        "drop" if path == "/update_weights" and release.wait(20) else None
    )
    sampler.update_weights(0)
    lost = [server.lost for server in sampler.fleet.servers]
    assert lost[0] is None and "/update_weights" in lost[1] and "still waits for one" in lost[2]
    assert calls(servers[0]).count("init_weight_transfer_engine") == 2
    assert sampler.metrics()["rollout/probe_gap"] < 1e-4
    release.set()


def test_an_update_that_broke_off_is_ended_first(policy, serve, tmp_path):
    """What a run left that was killed in the middle of one."""
    server = serve()
    server.updating = True
    sampler = open_transfer(policy, tmp_path, [server])
    sampler.update_weights(0)
    again = ["start_weight_update", "finish_weight_update", *UPDATE]
    assert calls(server)[len(OPENED + MEETING) :] == [*again, *MARKED[3:]]
    assert len(set(server.callers)) == len(server.callers), "no connection after an error's"


def test_a_server_of_another_shape_is_the_users_to_change(policy, serve, tmp_path):
    other = serve(folder=build_tiny("llama", tmp_path / "other", hidden_size=48))
    sampler = open_transfer(policy, tmp_path, [other])
    with pytest.raises(RolloutError, match=f"{other.url} cannot load .*serve the model of model.n"):
        sampler.update_weights(0)


def test_a_failure_in_this_process_is_told_as_such(policy, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(fastsd.serving.nccl_group, "GRACE_S", 0.3)
    sampler = open_transfer(policy, tmp_path, [serve()])

    def taken(address, port, group, weights):
        raise OSError(errno.EADDRINUSE, "Address already in use")

    sampler.sync = WeightTransfer(policy, 30.0, taken)
    with pytest.raises(RolloutError, match=r"127\.0\.0\.1:\d+, .* taken by another program"):
        sampler.update_weights(0)

    def broken(address, port, group, weights):
        raise RuntimeError("unhandled cuda error")

    sampler.sync = WeightTransfer(policy, 30.0, broken)
    with pytest.raises(RolloutError, match="in this process, RuntimeError: unhandled cuda error"):
        sampler.update_weights(0)

    class Half(MemoryEngine):
        def send_weights(self):
            self.client.start_weight_update()
            raise RuntimeError("out of memory")

    sampler.sync = WeightTransfer(policy, 30.0, Half.open)
    with pytest.raises(RolloutError, match="in this process, RuntimeError: out of memory"):
        sampler.update_weights(0)


def test_a_transfer_that_nobody_ends_is_left_alone(policy, serve, tmp_path, monkeypatch):
    """All servers answered, and the engine here hangs: as inside NCCL, where nothing wakes it."""
    monkeypatch.setattr(fastsd.serving.nccl_group, "GRACE_S", 0.2)
    release = threading.Event()

    class Hangs(MemoryEngine):
        def send_weights(self):
            self.client.start_weight_update()
            release.wait(20)

    sampler = open_transfer(policy, tmp_path, [serve()])
    sampler.sync = WeightTransfer(policy, 2.0, Hangs.open)
    with pytest.raises(RolloutUnavailable, match="did not take the weights in rollout.timeout_s"):
        sampler.update_weights(0)
    release.set()


def test_a_signal_ends_a_transfer_at_once(policy, serve, tmp_path):
    server, release, gate = serve(), threading.Event(), SignalGate()
    sampler = open_transfer(policy, tmp_path, [server])
    came, before = [], set(threading.enumerate())

    def stops(path, body):
        if path == "/update_weights":
            came.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            release.wait(20)
            return "drop"

    server.faults = stops
    with gate, pytest.raises(Interrupted):
        sampler.update_weights(0)
    assert time.monotonic() - came[0] < 3
    began = set(threading.enumerate()) - before
    running = [t for t in began if t.name.startswith(("transfer", "ThreadPool"))]
    for thread in running:
        thread.join(3)
    assert not any(thread.is_alive() for thread in running), "they would keep the process"
    release.set()


def fleet_of(servers, sync):
    config = RolloutConfig(engine="vllm", servers=[s.url for s in servers], sync=sync)
    return config, Fleet(config)


def test_what_auto_chooses_and_why(serve, monkeypatch):
    ready, other, plain = serve(backend="nccl"), serve(backend="ipc"), serve()
    installed = ModuleSpec("vllm", None, origin="vllm/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)

    def chosen(servers, device=GPU, sync="auto"):
        config, fleet = fleet_of(servers, sync)
        return choose_sync(config, device, fleet)

    assert chosen([ready, ready]) == ("nccl", "") == chosen([ready], sync="nccl")
    assert chosen([ready], sync="files") == ("files", "")
    assert chosen([ready], torch.device("cpu")) == ("files", "the policy is on cpu")
    assert chosen([ready, plain]) == ("files", f"{plain.url} takes no weight transfer")
    assert chosen([other]) == ("files", f"{other.url} was started for weight transfer by 'ipc'")
    for spec in (None, ModuleSpec("vllm", None)):  # a folder of that name is no package
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert chosen([ready]) == ("files", "the trainer cannot import vllm")


def test_nccl_that_cannot_be_is_refused_with_what_to_do(policy, serve, tmp_path, monkeypatch):
    plain = serve()
    with pytest.raises(RolloutError, match='sync = "nccl", but the policy is on cpu: train on a G'):
        open_tiny(policy, tmp_path, [plain], sync="nccl")
    config, fleet = fleet_of([plain], "nccl")
    with pytest.raises(RolloutError, match="cannot import vllm: install .*pip install vllm"):
        choose_sync(config, GPU, fleet)
    installed = ModuleSpec("vllm", None, origin="vllm/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    with pytest.raises(RolloutError, match=r"start it with --weight-transfer-config '{\"backend\""):
        choose_sync(config, GPU, fleet)
    plain.faults = lambda path, body: (200, {"vllm_config": 3}) if "server_info" in path else None
    with pytest.raises(RolloutError, match="/server_info.* cannot be used: no vllm_config"):
        choose_sync(config, GPU, fleet)
    plain.faults = lambda path, body: (404, b"") if "server_info" in path else None
    with pytest.raises(RolloutError, match="VLLM_SERVER_DEV_MODE=1"):
        choose_sync(config, GPU, fleet)
    with pytest.raises(RolloutError, match="cannot import vLLM's weight transfer .*; install vLLM"):
        open_nccl("127.0.0.1", 1, None, None)


def test_a_count_of_workers_that_is_none(policy, serve, tmp_path):
    server = serve()
    sampler = open_transfer(policy, tmp_path, [server])
    for nonsense in ({"world_size": 0}, {"world_size": "2"}, [1]):
        server.faults = lambda path, body, reply=nonsense: (
            (200, reply) if path == "/get_world_size" else None
        )
        with pytest.raises(RolloutError, match="/get_world_size cannot be used: .* names no world"):
            sampler.update_weights(0)


def test_the_servers_meet_this_process_where_they_reach_it():
    address, port = _meeting_place(["http://127.0.0.1:8000", "http://localhost:8001"])
    assert address == "127.0.0.1"
    with socket.create_server((address, port)):
        pass
    with pytest.raises(RolloutError, match="no IPv4 address that the servers can reach"):
        _meeting_place(["http://[::1]:8000"])
