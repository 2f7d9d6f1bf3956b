"""Starts programs under torchrun, on CPUs: for tests of launching itself; others: ranks.py."""

from __future__ import annotations

import os
import subprocess
import sys

from places import ROOT

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests' / 'helpers'}",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}


def torchrun(*program: str, ranks: int = 2, options: tuple[str, ...] = ()) -> subprocess.Popen:
    """`program`: a script or "-m", "--", module, then its arguments. stdout has all output."""
    # A store on a port of the system's choice, which stays open: no other test can take it.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks), *options]
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
