"""Servers of rollouts or critiques, apart from the trainer: vLLM replicas on devices of their own.

A server is some devices of a node that share its weights (tensor parallel). Each group of responses
is one server's, so that its prefix cache serves them, and as many rows are decoded side by side as
keys and values fit beside the weights. Their kernels are fused: between matrix products only the
residual stream and what a layer's parts hand on is moved, in a dozen operations a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastsd.planning.counts import Work, generation
from fastsd.planning.hardware import ASSUMED, Fleet, InPhases, PlanError, Seconds
from fastsd.planning.memory import RUNTIME_BYTES
from fastsd.planning.model import ModelCounts
from fastsd.planning.rows import Step

# Of a fused layer: elements moved a token, in units of the hidden size, and operations.
_FUSED_MOVES, _FUSED_OPERATIONS = 12, 12


@dataclass(frozen=True)
class Served(InPhases):
    """What a fleet does for one step.

    devices: of each server. rows: decoded side by side on one. tokens: read and written by all.
    sync: seconds to bring it new weights, sync_bytes to each server; zero for a critic.
    """

    role: str
    hardware: str
    servers: int
    devices: int
    rows: int
    tokens_in: float
    tokens_out: float
    works: tuple[Work, ...]
    seconds: tuple[Seconds, ...]
    sync_bytes: float
    sync: Seconds


def serve(model: ModelCounts, step: Step, fleet: Fleet, role: str, synced: bool) -> Served:
    """step: of the whole fleet. Servers have as many devices as gives the least time. Raises
    PlanError where no server fits into a node, or the fleet is smaller than one."""
    plans = [
        _served(model, step, fleet, role, synced, 2**n)
        for n in range(fleet.device.node.bit_length())
        if _groups(model, step, fleet, 2**n) and fleet.count >= 2**n <= fleet.device.node
    ]
    if not plans:
        raise PlanError(
            f"--{role}-hardware {fleet.count}x{fleet.device.name}: a server of {model.name} needs "
            f"{model.weight_bytes / 2**30:.0f} GiB for weights and "
            f"{_group_bytes(model, step) / 2**30:.0f} GiB for one question's responses, and a "
            f"device has {_free(fleet) / 2**30:.0f}; give more devices (up to {fleet.device.node} "
            "serve together), or others"
        )
    return min(plans, key=lambda plan: plan.low + plan.high)


def _served(
    model: ModelCounts, step: Step, fleet: Fleet, role: str, synced: bool, devices: int
) -> Served:
    at, servers = step.lengths, min(fleet.count // devices, step.questions)
    mine = replace(step, questions=math.ceil(step.questions / servers))
    rows = min(_groups(model, step, fleet, devices), mine.questions) * at.samples
    mine = replace(mine, batch_rows=rows)
    works = tuple(_split(model, work, devices) for work in generation(model, mine, role))
    sync_bytes = model.parameters * model.width if synced else 0.0
    # Every device of a server receives its part over the network, all servers at once.
    seconds = sync_bytes / devices / (1e9 * fleet.device.network_gbs)
    server = Fleet(fleet.device, devices)
    return Served(
        role=role,
        hardware=f"{fleet.count}x{fleet.device.name}",
        servers=servers,
        devices=devices,
        rows=rows,
        tokens_in=step.questions * at.question,
        tokens_out=step.questions * at.samples * at.response,
        works=works,
        seconds=tuple(server.seconds(work) for work in works),
        sync_bytes=sync_bytes,
        sync=Seconds(seconds / ASSUMED.link[1], seconds / ASSUMED.link[0], "link"),
    )


def _group_bytes(model: ModelCounts, step: Step) -> float:
    """Keys and values of a question and its responses."""
    at = step.lengths
    return model.kv_bytes * (at.question + at.samples * at.longest_response)


def _groups(model: ModelCounts, step: Step, fleet: Fleet, devices: int) -> int:
    """Questions whose keys and values a server has room for beside the weights."""
    room = devices * _free(fleet) - model.weight_bytes
    return max(0, int(room // _group_bytes(model, step)))


def _free(fleet: Fleet) -> float:
    return fleet.capacity - RUNTIME_BYTES["gpu"]


def _split(model: ModelCounts, work: Work, devices: int) -> Work:
    """One device's share of a server's work. Two sums over the devices a layer, each of which moves
    twice the hidden states of all but itself."""
    exchanged = 4 * model.layers * model.hidden * model.width * work.tokens * (devices - 1)
    moved = _FUSED_MOVES * model.layers * model.hidden * model.width * work.tokens
    uses = tuple(
        use._replace(product=use.product._replace(outer=math.ceil(use.product.outer / devices)))
        for use in work.products
    )
    return replace(
        work,
        products=uses,
        attention_flop=work.attention_flop / devices,
        attention_bytes=work.attention_bytes / devices,
        moved_bytes=moved / devices,
        swept_bytes=0.0,
        operations=_FUSED_OPERATIONS * model.layers * work.passes,
        link_bytes=exchanged / devices,
    )
