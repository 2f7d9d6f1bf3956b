"""The policy's weights into the servers' memory by vLLM's own NCCL weight transfer, without files.

This process is rank 0 of one NCCL group and the workers of all living servers are the others, so
that one broadcast reaches every server. vLLM's trainer engine sends: it reads `PolicyWeights` and
calls a `ServerGroup`. A group lasts as long as its servers do; one that died, was restarted or came
back makes a new one. Where the weights are spread over ranks, the first one sends them alone: it
holds all of them then, as it does for its rollouts.

Nobody can wake who waits inside NCCL for a server that has died. So the engine works in a thread,
which is left alone once a server fails or rollout.timeout_s is over. A server that still waits for
its peers GRACE_S later is lost too, and those that answered get the weights in a new group.
"""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit

import torch

from fastsd.config.sections import RolloutConfig
from fastsd.serving.fleet import Fleet
from fastsd.serving.nccl_group import Engine, ServerGroup
from fastsd.serving.server import RolloutError, VllmServer
from fastsd.serving.weights import PlacedWeights, PolicyWeights, ServedPolicy

if TYPE_CHECKING:
    import httpx


_HOW_TO_START = """start it with --weight-transfer-config '{"backend": "nccl"}'"""


# (this host's address, port, whom it calls, what it sends) -> an engine whose group stands.
OpenEngine = Callable[[str, int, ServerGroup, PolicyWeights], Engine]


class Choice(NamedTuple):
    """How servers get the weights, and why, where that was ours to choose."""

    kind: Literal["files", "nccl"]
    why: str = ""


def choose_sync(config: RolloutConfig, device: torch.device, fleet: Fleet) -> Choice:
    """What rollout.sync means for these servers. Raises RolloutError where NCCL is asked for and
    something is missing for it."""
    if config.sync == "files":
        return Choice("files")
    missing = _missing(device, fleet)
    if missing is None:
        return Choice("nccl")
    if config.sync == "nccl":
        raise RolloutError(f'rollout.sync = "nccl", but {missing[0]}: {missing[1]}')
    return Choice("files", missing[0])


def _missing(device: torch.device, fleet: Fleet) -> tuple[str, str] | None:
    """What NCCL weight transfer lacks, and what to do about it."""
    if device.type != "cuda":
        return f"the policy is on {device.type}", 'train on a GPU, or set rollout.sync = "files"'
    installed = importlib.util.find_spec("vllm")
    if installed is None or installed.origin is None:  # a folder of that name has no origin
        how = "install the servers' version of it with `pip install vllm` where fastsd is"
        return "the trainer cannot import vllm", how
    for server, backend in fleet.everywhere(_backend):
        if backend != "nccl":
            found = f"{server.url} was started for weight transfer by {backend!r}"
            return found if backend else f"{server.url} takes no weight transfer", _HOW_TO_START
    return None


async def _backend(client: httpx.AsyncClient, server: VllmServer) -> str | None:
    return await server.transfer_backend(client)


def open_nccl(address: str, port: int, group: ServerGroup, weights: PolicyWeights) -> Engine:
    """vLLM's own trainer engine, once all of the group have met. Raises RolloutError where vLLM
    cannot be imported."""
    try:
        from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )
    except ImportError as error:
        raise RolloutError(
            f"rollout.sync: the trainer cannot import vLLM's weight transfer ({error}); install "
            'vLLM 0.32 or newer where fastsd is, or set rollout.sync = "files"'
        ) from error
    info = NCCLTrainerInitInfo(address, port, group.world_size, rank=0)
    return NCCLTrainerWeightTransferEngine.trainer_init(info, client=group, source=weights)


class WeightTransfer:
    """Hands weights to servers by vLLM's weight transfer; what `SharedFiles` does by a folder.

    timeout_s: for each call of a server, and for a transfer as a whole. open_engine: what sends.
    """

    name = "NCCL"

    def __init__(self, policy: ServedPolicy, timeout_s: float, open_engine: OpenEngine = open_nccl):
        self._policy, self._open_engine, self._timeout_s = policy, open_engine, timeout_s
        self._group: ServerGroup | None = None
        self._label = ""

    def collect(self, weights: PlacedWeights) -> Callable[[Fleet, int], None]:
        """What gives all living servers of a fleet the present weights; one that fails is lost."""
        return self._give

    def settle(self) -> None:
        """Nothing is left over."""

    def _give(self, fleet: Fleet, version: int) -> None:
        self._drop_changed_group(fleet)
        while fleet.living and not self._sent(fleet):
            pass
        self._label = fleet.label

    def _drop_changed_group(self, fleet: Fleet) -> None:
        """A server without the mark that came with the last weights is another process by now."""
        label = self._label
        held = fleet.everywhere(lambda client, server: server.holds(client, label), fleet.living)
        intact = all(holds for _, holds in held)
        if self._group and (self._group.servers != fleet.living or not intact):
            self._drop()

    def _sent(self, fleet: Fleet) -> bool:
        """One transfer to all living servers. False where some failed, which are lost now.

        Raises RolloutError for what another attempt would meet again.
        """
        if self._group is None:
            workers = fleet.everywhere(lambda client, server: server.workers(client), fleet.living)
            if not workers:
                return False
            self._group = ServerGroup(workers)
        group = self._group
        group.begin(self._timeout_s)
        thread = threading.Thread(target=self._work, args=[group], name="transfer", daemon=True)
        if self._policy.device.type == "cuda":
            torch.cuda.synchronize(self._policy.device)  # other streams read what this one wrote
        thread.start()
        try:
            whole = group.wait(self._timeout_s)
        except BaseException:
            self._drop()
            raise
        if not whole:
            self._drop()
            group.refuse()
            for server, why in group.failed.items():
                fleet.lose(server, why)
        return whole

    def _work(self, group: ServerGroup) -> None:
        try:
            if self._policy.device.type == "cuda":
                torch.cuda.set_device(self._policy.device)
            if group.engine is None:
                address, port = _meeting_place([server.url for server in group.servers])
                group.place = f"{address}:{port}"
                weights = PolicyWeights(self._policy)
                group.engine = self._open_engine(address, port, group, weights)
            group.engine.send_weights()
        except Exception as error:
            group.end(error)
        else:
            group.end(None)

    def _drop(self) -> None:
        if self._group is not None:
            self._group.give_up()
        self._group = None


def _meeting_place(urls: Sequence[str]) -> tuple[str, int]:
    """This host's address as the servers see it, and a port that is free there."""
    try:
        # One beyond this host, if any: its route leads out, and local servers can take it too.
        address = min((_own_address(url) for url in urls), key=lambda own: own.startswith("127."))
        with socket.socket() as free:
            free.bind((address, 0))
            return address, free.getsockname()[1]
    except OSError as error:
        raise RolloutError(
            f"rollout.sync: this host has no IPv4 address that the servers can reach ({error}); "
            'name them by IPv4 addresses, or set rollout.sync = "files"'
        ) from error


def _own_address(url: str) -> str:
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        return probe.getsockname()[0]
