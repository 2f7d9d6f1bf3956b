"""vLLM's weight transfer endpoints, driven by our client with vLLM's trainer engine, over gloo.

The trainer needs vLLM itself, so it is a process with that environment's python.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest
from places import ROOT

from fastsd.rollout.vllm import PROBE_TOLERANCE

pytestmark = [pytest.mark.vllm]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(server, model, programs, tmp_path_factory) -> dict:
    settings = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{HERE}",
        "VLLM_TARGET_DEVICE": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    place = tmp_path_factory.mktemp("transfer")
    script = str(HERE / "transfer_worker.py")
    done = subprocess.run(
        [str(programs / "python"), script, server, str(model), str(place)],
        capture_output=True,
        text=True,
        env=settings,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_server_says_what_it_was_started_for(found):
    assert found["backend"] == "gloo"
    assert found["name"] == "vLLM, 1 server, weights by shared files (the policy is on cpu)"


def test_the_served_text_follows_transferred_weights(found, server):
    gaps = {name: found[name]["gap"] for name in ("base", "stale", "renewed")}
    print(f"gaps: {gaps}; a transfer and its probe took {found['seconds']:.1f} s")
    assert gaps["base"] <= PROBE_TOLERANCE and gaps["renewed"] <= PROBE_TOLERANCE
    assert gaps["stale"] > 2 * max(gaps["base"], gaps["renewed"])
    assert found["stale"] == {**found["base"], "gap": gaps["stale"]}, "the same weights till then"
    assert found["renewed"]["ids"] != found["base"]["ids"]
    mark = httpx.get(f"{server}/weight_info", trust_env=False).json()["weight_version"]
    assert mark.startswith("fastsd-")


def test_transferred_weights_are_those_of_the_folder(found):
    """To the last bit: tied head, fused projections; and a group that met anew, over an update that
    was left open."""
    renewed, anew, by_files = (found[name] for name in ("renewed", "met anew", "by files"))
    assert renewed == anew == by_files
