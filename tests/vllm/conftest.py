"""One real vLLM server on loopback for the tests here, on SmolLM2-135M. `make test-vllm` runs them;
it has built the environment that $FASTSD_VLLM names (.venv-vllm). The server takes weights from a
folder, and by weight transfer over gloo (`gloo_engine`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from places import ROOT as REPOSITORY

from fastsd.pretraining.smollm2 import save_plain

MODEL = REPOSITORY / "models" / "smollm2-plain"
NAME = "smol"
MAX_MODEL_LEN = 1024
START_S = 300.0
# vLLM's own: the CPU build, the endpoints that take weights, gigabytes of keys and values.
SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(autouse=True)
def _reward_can_be_imported(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    """A folder that is emptied at once: a run here leaves gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def model() -> Path:
    """The published SmolLM2-135M-Instruct as a Hugging Face folder, written once."""
    if not MODEL.exists():
        MODEL.parent.mkdir(exist_ok=True)
        save_plain(MODEL)
    return MODEL


@pytest.fixture(scope="session")
def programs() -> Path:
    """Where vLLM's environment has its python and vllm."""
    environment = Path(os.environ.get("FASTSD_VLLM", REPOSITORY / ".venv-vllm")).resolve()
    folder = environment / "bin"
    if not (folder / "vllm").exists():
        pytest.fail(f"{folder / 'vllm'} is not there: run `make test-vllm`, which builds it")
    return folder


@pytest.fixture(scope="session")
def server(model, programs, tmp_path_factory) -> Iterator[str]:
    """Its base URL, with the published weights at first. Ended with all its processes."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    place = tmp_path_factory.mktemp("vllm")
    command = [
        *("nice", "-n", "10", str(programs / "vllm"), "serve", str(model)),
        *("--served-model-name", NAME, "--worker-extension-cls", "gloo_engine.Extension"),
        *("--weight-transfer-config", json.dumps({"backend": "gloo"})),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--logprobs-mode", "processed_logprobs"),
        # On a CPU vLLM 0.32 dies where a prompt with a seed of its own is prefilled in parts.
        "--no-enable-chunked-prefill",
    ]
    # vLLM uses every core whatever the tests' own limit is.
    settings = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | SETTINGS
    settings["PYTHONPATH"] = str(Path(__file__).parent)
    start = time.monotonic()
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=place, env=settings, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(url, process, place / "log")
        print(f"vLLM was up in {time.monotonic() - start:.0f} s")
        yield url
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start within {START_S:.0f} s:\n{log.read_text()[-4000:]}")


def _end(process: subprocess.Popen) -> None:
    """The server and its workers, which share its process group."""
    for signum, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, signum)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
