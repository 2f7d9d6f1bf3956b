"""Ranks and programs in processes forked from one that has imported everything.

torch, transformers and fastsd take some 9 CPU seconds to import, two ranks under torchrun 17; a
fork of a process that has them (fork_server.py, one for each pytest process) takes none. Not for
tests of launching itself, of imports or of start-up: those keep torchrun.py and subprocess.

Not multiprocessing's forkserver: its children leave by os._exit, so that how a rank ends went
untested, and what it preloads does not see pytest's pythonpath.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("fork_server.py")
ONE_RANKS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass
class Request:
    """Processes to fork: each its environment and the files that its output goes to; the function
    and its arguments are pickled apart, to be imported in the fork only."""

    environments: list[dict[str, str]]
    outputs: list[tuple[str, str]]
    folder: str
    path: list[str]
    call: bytes
    timeout_s: float


class ForkServer:
    """The process that forks; started when it is first asked, it ends with this one."""

    def __init__(self) -> None:
        given = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: given[name] for name in given if name not in ONE_RANKS_OWN},
            start_new_session=True,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the server and, where some still run, its forks."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, request: Request) -> list[int | None]:
        """Exit codes as subprocess has them, once all have ended; None for what was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        try:
            return pickle.load(self.process.stdout)
        except BaseException:  # a test that is interrupted: the next must not read its answer
            _running.clear()
            self.close()
            raise


_running: list[ForkServer] = []


def _forked(
    call: tuple[Callable, tuple], environments: list[dict], outputs: list, timeout_s: float
) -> list[int | None]:
    if not _running or _running[0].process.poll() is not None:
        _running[:] = [ForkServer()]
    outputs = [(str(out), str(err)) for out, err in outputs]
    request = Request(
        environments, outputs, os.getcwd(), list(sys.path), pickle.dumps(call), timeout_s
    )
    return _running[0].run(request)


def start_ranks(
    function: Callable, *arguments: Any, ranks: int = 2, timeout_s: float = 240
) -> tuple[list[int | None], str]:
    """`function(*arguments)` on each of the ranks: their exit codes, and all that they printed.

    function: of a module that can be imported by its name. The ranks meet as under torchrun, in a
    store of the launcher's, whose port is open from its choice on: no other test can take it.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    environments = [common | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        codes = _forked((function, arguments), environments, [(f, f) for f in files], timeout_s)
        told = [f"rank {n} ended with {codes[n]}\n{f.read_text()}" for n, f in enumerate(files)]
    return codes, "\n".join(told)


def run_ranks(function: Callable, *arguments: Any, ranks: int = 2, timeout_s: float = 240) -> str:
    """The same for ranks that must end well. Their output."""
    codes, output = start_ranks(function, *arguments, ranks=ranks, timeout_s=timeout_s)
    assert codes == [0] * ranks, output
    return output


def run_program(
    module: str,
    *words: object,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240,
) -> subprocess.CompletedProcess[str]:
    """`python -m module words...` without its imports: `module.main(words)` in a fork.

    env: on top of this process's. Raises subprocess.TimeoutExpired as subprocess.run does.
    """
    argv = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        files = (Path(folder) / "stdout", Path(folder) / "stderr")
        [code] = _forked((_program, (module, argv)), [os.environ | (env or {})], [files], timeout_s)
        out, err = (file.read_text() for file in files)
    if code is None:
        raise subprocess.TimeoutExpired([module, *argv], timeout_s, out, err)
    return subprocess.CompletedProcess([module, *argv], code, out, err)


def _program(module: str, argv: Sequence[str]) -> None:
    from importlib import import_module

    program = import_module(module)
    sys.argv = [str(program.__file__), *argv]
    sys.exit(program.main(list(argv)))
