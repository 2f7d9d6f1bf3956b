"""The processes of one run: what torchrun started, or this process alone.

`torchrun --nproc-per-node 2 -m fastsd.train run.toml` starts the same program twice; RANK and
WORLD_SIZE in the environment say so, and without them there is no process group at all. What must
not happen is that one rank waits for another that has failed. So work that a rank does on its own,
and that may fail, goes through `together` or `lead`: an error on any rank is raised on all. What
cannot be caught so, a rank that died or hangs, ends the others' next message after
`parallel.timeout_s` with RankLost. Only objects in memory go from rank to rank, never files.

What the user reads is one program's output: rank 0 prints, and an error that all ranks raise is
printed once on each machine.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from fastsd.errors import FastsdError, Interrupted, RankLost

T = TypeVar("T")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class World:
    """The ranks of a run. Every method is collective: all ranks call it, or none."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, timeout_s: float = 0.0):
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        # The rank's number on its machine; None for one process, which has all of it.
        self.local_rank = local_rank if size > 1 else None
        self._meshes: dict[str, Any] = {}

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every rank's `work()`, in the order of ranks. What it raises on one is raised on all: a
        FastsdError as its own class with the rank's number, a signal as Interrupted."""
        if self.size == 1:
            return [work()]
        value, error = None, None
        try:
            value = work()
        except (Exception, Interrupted) as raised:
            error = raised
        answers = self.gather((value, _described(error)))
        failed = [(rank, told) for rank, (_, told) in enumerate(answers) if told is not None]
        if failed:
            # One rank's signal stops the run; what else went wrong at that moment does not matter.
            rank, told = next((f for f in failed if f[1][0] is Interrupted), failed[0])
            raise error if error is not None and rank == self.rank else _rebuilt(rank, told)
        return [value for value, _ in answers]  # pyright: ignore[reportReturnType]

    def lead(self, work: Callable[[], T]) -> T:
        """What `work()` gives on rank 0; the others do nothing and are given it, or its error."""
        [value, *_] = self.together(lambda: work() if self.leads else None)
        return value  # pyright: ignore[reportReturnType]

    def mesh(self, device_type: str) -> Any:
        """All ranks as torch's DeviceMesh, for tensors that are spread over them."""
        if device_type not in self._meshes:
            from torch.distributed.device_mesh import init_device_mesh

            self._meshes[device_type] = init_device_mesh(device_type, (self.size,))
        return self._meshes[device_type]

    def disconnect(self) -> None:
        """Ends the connection and its threads, where nothing else still holds this world's meshes'
        groups. Afterwards no method may be called."""
        import torch.distributed as dist

        if not dist.is_initialized():
            return
        dist.destroy_process_group()
        # DTensor's caches keep every mesh to the process's end, and a mesh keeps its groups.
        for mesh in self._meshes.values():
            mesh._pg_registry.clear()
        gc.collect()


ALONE = World()
_opened: list[World] = []


def open_world(timeout_s: float, device: str = "auto") -> World:
    """This run's ranks, connected the first time. `device`: as in the configuration.

    Raises FastsdError for an environment that is torchrun's only in part, RankLost where the others
    do not come within timeout_s.
    """
    if _opened:
        return _opened[0]
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in _NAMES)
    except (KeyError, ValueError) as error:
        raise FastsdError(
            f"WORLD_SIZE is set, but {', '.join(_NAMES)} are not all numbers ({error}): start many "
            "processes with torchrun --nproc-per-node N -m fastsd.train, or unset WORLD_SIZE"
        ) from error
    world = World(rank, size, local_rank, timeout_s)
    _opened.append(world)
    if size > 1:
        _connect(world, device)
    return world


@contextlib.contextmanager
def guarded(where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Failures of the communication inside are raised as RankLost; `where` says in which phase."""
    try:
        yield
    except RuntimeError as error:
        if not _opened or not _is_communication(error):
            raise
        world = _opened[0]
        raise RankLost(
            f"rank {world.rank} of {world.size}: another rank did not answer{where()}. It died "
            "(look for its error above) or hangs: none may be more than parallel.timeout_s = "
            f"{world.timeout_s:g} s behind. The checkpoints are intact; continue with --resume "
            f"auto ({str(error).splitlines()[0]})"
        ) from error


@contextlib.contextmanager
def left_in_order() -> Iterator[None]:
    """For a program's whole work: at its end, success or an error that all ranks raise, ranks are
    disconnected. A thread of gloo's that frees the tensors of its last message while Python
    finalizes aborts the process; destroy_process_group alone leaves these threads running.

    Not after RankLost or a defect: such a thread may wait for a rank that hangs. See `leave`."""
    try:
        yield
    except RankLost:
        raise
    except (FastsdError, Interrupted) as error:
        _disconnect(error)
        raise
    _disconnect(None)


def _disconnect(error: BaseException | None) -> None:
    # Frames of an error's traceback hold the model, and it the connection.
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    while _opened:
        _opened.pop().disconnect()


def leave(main: Callable[[], int]) -> NoReturn:
    """Runs a program and ends the process with its exit code. Where the connection is still open,
    a thread of it may wait for a rank that hangs, and nothing in torch ends that: such a process
    ends without Python's finalization, which the thread could abort."""
    try:
        code = main()
    except Exception:
        if not _opened:
            raise
        traceback.print_exc()
        code = 1
    if not _opened:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _connect(world: World, device: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    # Objects travel through gloo; on GPUs the weights and gradients through NCCL.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = datetime.timedelta(seconds=world.timeout_s)
    with guarded(lambda: " when the run began"):
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # torchrun may keep its store over a restart, with the addresses of ranks that are gone.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        _refuse_other_devices(store, world, "CUDA" if on_gpu else "the CPU")
        if on_gpu:
            _take_gpu(world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _refuse_other_devices(store: Any, world: World, own: str) -> None:
    """Ranks on GPUs and on CPUs would wait for one another without end: the backends differ."""
    store.set(f"device/{world.rank}", own)
    found = store.multi_get([f"device/{rank}" for rank in range(world.size)])
    kinds = [kind.decode() for kind in found]
    other = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise FastsdError(
            f"rank 0 would run on {kinds[0]} and rank {other} on {kinds[other]}: give every node "
            "the same --device, and see that torch finds GPUs on all of them or on none"
        )


def _take_gpu(world: World) -> None:
    import torch

    here, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > here:
        raise FastsdError(
            f"torchrun started {ranks} processes on this machine, where torch finds {here} GPUs: "
            f"start it with --nproc-per-node {here}, or with --device cpu"
        )
    torch.cuda.set_device(world.local_rank)


def _described(error: BaseException | None) -> tuple[type, str, int] | None:
    """An error as what can be sent: its class, its text, and the signal's number."""
    if error is None:
        return None
    if isinstance(error, Interrupted):
        return Interrupted, "", error.exit_code - 128
    if isinstance(error, FastsdError):
        return type(error), str(error), 0
    return FastsdError, f"{type(error).__name__}: {error}", 0


def _rebuilt(rank: int, told: tuple[type, str, int]) -> BaseException:
    kind, text, signum = told
    if kind is Interrupted:
        return Interrupted(signum)
    # Not through __init__: a subclass may take other arguments than its text.
    error: Exception = kind.__new__(kind)  # pyright: ignore[reportCallIssue]
    Exception.__init__(error, f"rank {rank}: {text}")
    return error


def _is_communication(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors; torch's own are DistError."""
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection" in text
