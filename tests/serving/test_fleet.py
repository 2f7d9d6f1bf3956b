"""Several servers: who draws next, what is drawn again, and whose weights are the right ones."""

import threading
import time

import pytest
import torch
from fake_vllm import FIXTURES, PROMPTS, open_tiny

from fastsd.config.sections import ModelConfig
from fastsd.model import load_policy
from fastsd.serving.server import RolloutError, RolloutUnavailable

folder, _, serve = FIXTURES


@pytest.fixture
def policy(folder):
    """Not the weights that the servers start with, and far from uniform."""
    policy = load_policy(ModelConfig(name=str(folder)), "cpu", torch.float32)
    with torch.no_grad():
        policy.head_VD.mul_(10)
    return policy


def drawn(server):
    """Groups that it was asked for; the first request is the probe."""
    return len(server.asked("/v1/completions")) - 1


def pausing(seconds):
    return lambda path, body: time.sleep(seconds)


def test_groups_go_round_the_servers_up_to_a_limit(policy, serve, tmp_path):
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers, max_new_tokens=2, concurrency=2)
    vllm.update_weights(0)
    for server in servers:
        server.faults = pausing(0.05)
    vllm.sample(PROMPTS * 4, 2, key=(1,))
    counts = [drawn(server) for server in servers]
    assert sum(counts) == 16 and min(counts) >= 4
    assert [server.most_at_once for server in servers] == [2, 2]


def test_servers_with_room_share_the_groups(policy, serve, tmp_path):
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers, max_new_tokens=2)
    vllm.update_weights(0)
    vllm.sample(PROMPTS[:1] * 8, 2, key=(1,))
    assert [drawn(server) for server in servers] == [4, 4]


@pytest.mark.parametrize("groups, at_once", [(0, 6), (0.5, 1), (1, 1), (2.5, 2), (100, 6)])
def test_tokens_under_way_have_a_limit(policy, serve, tmp_path, groups, at_once):
    """In groups' worth; 0: no limit. A group that is above it alone goes alone."""
    server = serve()
    probe = open_tiny(policy, tmp_path, [server], max_new_tokens=2)
    of_one = len(probe.renderer.student(PROMPTS[0])) + 3 * 2
    limit = int(groups * of_one)
    vllm = open_tiny(policy, tmp_path, [server], max_new_tokens=2, server_tokens=limit)
    vllm.update_weights(0)
    server.faults = pausing(0.1)
    vllm.sample(PROMPTS[:1] * 6, 3, key=(1,))
    assert server.most_at_once == at_once


def test_the_server_with_least_under_way_draws_next(policy, serve, tmp_path):
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers, max_new_tokens=2, concurrency=1)
    vllm.update_weights(0)
    servers[0].faults = pausing(1.0)
    vllm.sample(PROMPTS * 2, 1, key=(1,))
    assert drawn(servers[0]) <= 3 and drawn(servers[1]) >= 5


def test_groups_drawn_again_are_counted_and_whole(policy, serve, tmp_path):
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers)
    alone = open_tiny(policy, tmp_path / "alone", [serve()]).sample(PROMPTS, 3, key=(1,))
    vllm.update_weights(0)
    assert vllm.metrics()["rollout/retried_groups"] == 0
    servers[1].faults = lambda path, body: "drop" if path == "/v1/completions" else None
    assert vllm.sample(PROMPTS, 3, key=(1,)) == alone
    retried = vllm.metrics()["rollout/retried_groups"]
    assert retried == drawn(servers[1]) == 2
    assert drawn(servers[0]) == len(PROMPTS)


def test_what_a_restarted_server_drew_is_drawn_again(policy, serve, tmp_path):
    """It lives again at once, with its first weights, and answers as if nothing had happened."""
    servers = [serve(), serve()]
    alone = open_tiny(policy, tmp_path / "alone", [serve()]).sample(PROMPTS, 3, key=(1,))
    vllm = open_tiny(policy, tmp_path, servers)
    vllm.update_weights(0)
    once = iter([servers[1].restart])
    lock = threading.Lock()

    def restart(path, body):
        with lock:
            next(once, lambda: None)() if path == "/v1/completions" else None

    servers[1].faults = restart
    assert vllm.sample(PROMPTS, 3, key=(1,)) == alone
    assert vllm.metrics()["rollout/servers"] == 1
    assert vllm.metrics()["rollout/retried_groups"] == drawn(servers[1]) == 2
    servers[0].restart()
    with pytest.raises(RolloutUnavailable, match="restarted, or another run uses it"):
        vllm.sample(PROMPTS, 3, key=(1,))


def test_a_restarted_server_gets_the_same_weights_again_before_a_batch(policy, serve, tmp_path):
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers)
    vllm.update_weights(4)
    first = vllm.sample(PROMPTS, 3, key=(1,))
    marks = {server.version for server in servers}
    assert len(marks) == 1 and marks.pop().startswith("fastsd-4-")
    servers[1].restart()
    vllm.update_weights(4)
    assert [len(server.asked("/collective_rpc")) for server in servers] == [2, 2]
    vllm.update_weights(5, staleness=1)
    assert [len(server.asked("/collective_rpc")) for server in servers] == [2, 2]
    assert vllm.sample(PROMPTS, 3, key=(1,)) == first
    servers[0].restart()
    vllm.update_weights(5, staleness=1)
    assert servers[0].version.startswith("fastsd-5-") and vllm.version == 5
    assert vllm.metrics()["rollout/staleness"] == 0


def test_a_server_that_missed_a_beat_is_asked_again_with_the_weights_it_has(
    policy, serve, tmp_path
):
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers)
    vllm.update_weights(0)
    servers[1].faults = lambda path, body: path == "/v1/completions" and (503, b"busy")
    vllm.sample(PROMPTS, 2, key=(1,))
    assert vllm.metrics()["rollout/servers"] == 1
    servers[1].faults = lambda path, body: None
    vllm.update_weights(1, staleness=1)
    assert vllm.metrics()["rollout/servers"] == 2
    assert [len(server.asked("/collective_rpc")) for server in servers] == [1, 1]


def test_a_half_loaded_server_does_not_pass_for_a_whole_one(policy, serve, tmp_path):
    """It has the mark of the load before, and weights of nobody knows which update."""
    servers = [serve(), serve()]
    vllm = open_tiny(policy, tmp_path, servers)
    vllm.update_weights(0)
    servers[1].restart()
    servers[0].faults = lambda path, body: path == "/collective_rpc" and (500, b"half")
    vllm.update_weights(0)
    assert vllm.metrics()["rollout/servers"] == 1
    servers[0].faults = lambda path, body: None
    vllm.update_weights(0)
    assert vllm.metrics()["rollout/servers"] == 2
    assert len(servers[0].asked("/collective_rpc")) == 3


def test_a_server_of_a_model_of_another_shape(policy, serve, tmp_path):
    server = serve()
    server.faults = lambda path, body: path == "/collective_rpc" and (500, b"size mismatch")
    vllm = open_tiny(policy, tmp_path, [server])
    with pytest.raises(RolloutError, match="serve the model of model.name, .*size mismatch"):
        vllm.update_weights(0)
