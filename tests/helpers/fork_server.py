"""The process that ranks.py forks from: imports everything, then forks as it is told on stdin.

It computes nothing and starts no thread, for a fork has the thread alone that forked. A forked
process returns from here and ends as a program does, by the interpreter's own exit.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import select
import signal
import sys
import time

POLL_S = 0.01


def preload() -> None:
    """What ranks and programs import, the lazy parts of torch and transformers too.

    Not pyarrow: a thread comes with it.
    """
    import peft  # noqa: F401
    import torch
    import torch.distributed.checkpoint  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import torch.distributed.tensor  # noqa: F401
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    import fastsd.evaluate  # noqa: F401
    import fastsd.train  # noqa: F401
    import fastsd.training.experiment  # noqa: F401
    import fastsd.training.session  # noqa: F401

    _ = transformers.AutoModelForCausalLM, transformers.PreTrainedTokenizerFast
    torch.set_num_threads(1)


def threads() -> int:
    """Of this process, where the system tells."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1


def forked(request, number: int, to_client: int) -> bool:
    """Forks process `number`; True in it. It leads a group, to be killed with what it starts."""
    pid = os.fork()
    if pid:
        alive[pid] = number
        return False
    os.setsid()
    os.close(to_client)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    out, err = request.outputs[number]
    for name, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environments[number])
    sys.path[:] = request.path
    return True


def codes_of(request, requests) -> list[int | None]:
    """Waits for all; kills them after the time limit, or when the client is gone."""
    codes: list[int | None] = [None] * len(request.environments)
    deadline = time.monotonic() + request.timeout_s
    while alive:
        gone, _, _ = select.select([requests], [], [], POLL_S)
        if gone or time.monotonic() > deadline:
            for pid in alive:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            alive.clear()
        for pid in list(alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[alive.pop(pid)] = os.waitstatus_to_exitcode(status)
    return codes


def last_words() -> None:
    """Run after all other exit handlers. What is frozen is never freed, which saves every fork 0.5
    CPU seconds and makes nanobind print a list of leaks; an abort still shows in the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def serve():
    """Answers requests; in a forked process, what it has to do."""
    to_client = os.dup(1)
    os.dup2(2, 1)
    atexit.register(last_words)
    preload()
    gc.freeze()
    requests = sys.stdin.buffer
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return None
        assert threads() == 1, "a thread of this process would be missing in its forks"
        for number in range(len(request.environments)):
            if forked(request, number, to_client):
                alive.clear()
                return request
        os.write(to_client, pickle.dumps(codes_of(request, requests)))


alive: dict[int, int] = {}

if __name__ == "__main__":
    found = serve()
    if found is not None:
        from fastsd.runtime.world import left_in_order

        function, arguments = pickle.loads(found.call)
        with left_in_order():
            function(*arguments)
