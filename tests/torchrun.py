"""Starts test programs under torchrun, on CPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}


def torchrun(*program: str, ranks: int = 2, options: tuple[str, ...] = ()) -> subprocess.Popen:
    """`program`: a script or "-m", "--", module, then its arguments. stdout has all output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(ranks), "--master-port", str(port), *options]
    return subprocess.Popen(
        [*launcher, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


def finished(process: subprocess.Popen, timeout_s: float = 120) -> str:
    """The output of a program that must end well."""
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output
    return output
