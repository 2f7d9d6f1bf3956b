"""One rank of test_plan_ranks.py.

A case is {config, lengths}: one update of a sharded session on samples of just these lengths.
FOLDER/RANK.json then has, by case, the bytes that the rank received from others by phase of the
plan, and the bytes of its shards.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from fastsd.config import Config
from fastsd.runtime.shards import local
from fastsd.runtime.world import open_world
from fastsd.train import update
from fastsd.training.session import Session
from fastsd.types import Prompt, Rollout, Sample


class Received:
    """Counts what collectives on floating-point tensors bring to this rank, by phase.

    A rank receives all parts but its own of what is gathered, as much of what is reduced to parts,
    and twice that of what is reduced to all, for a ring does one and then the other.
    """

    def __init__(self, ranks: int):
        self.others = (ranks - 1) / ranks
        self.bytes: Counter[str] = Counter()
        self.phase = ""
        self._wrap("all_gather_single", lambda args: args[0].nbytes)
        self._wrap("reduce_scatter_single", lambda args: args[1].nbytes)
        self._wrap("all_reduce", lambda args: 2 * args[0].nbytes)
        self._wrap("all_gather", lambda args: sum(part.nbytes for part in args[0]))

    def _wrap(self, name: str, size) -> None:
        function = getattr(dist, name)

        def counted(*args, **kwargs):
            args = (*args, *kwargs.values())
            first = args[0][0] if isinstance(args[0], list) else args[0]
            # Not what is said about a call; row statistics have fewer columns than a hidden state.
            if first.is_floating_point() and (first.ndim == 1 or first.shape[-1] > 16):
                self.bytes[self.phase] += size(args) * self.others
            return function(*args[: len(args) - len(kwargs)], **kwargs)

        setattr(dist, name, counted)


def watch(session: Session, received: Received) -> None:
    """Phases of the plan from those of the session's clock."""
    clocked, backward = session.clock.phase, session.optimizer.backward

    def phase(name: str, *counts):
        received.phase = {"student": "student forward", "teacher": "teacher forward"}.get(
            name, name
        )
        return clocked(name, *counts)

    def counted(loss):
        received.phase = "student backward"
        backward(loss)

    session.clock.phase, session.optimizer.backward = phase, counted


def samples(session: Session, lengths: dict[str, int]) -> list[Sample]:
    """Groups of equal lengths, of tokens that are any."""
    made, own = [], session.config.condition == "critique"
    for question in range(session.config.rollout.prompts_per_step):
        student = (5 + question % 7,) * lengths["question"]
        for number in range(lengths["samples"]):
            prompt = Prompt(str(question), ({"role": "user", "content": "?"},))
            response = (20 + number,) * lengths["response"]
            logprobs = (-1.0,) * lengths["response"]
            rollout = Rollout(prompt, number, response, logprobs, "", True, reward=1.0)
            shown = (13 + number if own else 12,) * lengths["feedback"]
            teacher = None if session.teacher is None else (*student, *shown)
            made.append(Sample(rollout, student, teacher, (-1.0) ** number))
    return made


def run_case(case: dict, folder: Path, received: Received) -> dict:
    session = Session(Config(**case["config"]), folder)
    watch(session, received)
    received.bytes.clear()
    received.phase = "rollout decode"
    with session.placement.gathered():
        pass
    update(session, samples(session, case["lengths"]))
    state = session.optimizer.state_tensors()
    moments = sum(local(t).nbytes for name, t in state.items() if not name.startswith("master/"))
    copied = 0
    if session.teacher is not None and session.teacher.policy is not session.policy:
        averages = session.teacher.state_tensors().values()
        copied = shard_bytes(session.teacher.policy.model) + sum(local(t).nbytes for t in averages)
    return {
        "bytes": dict(received.bytes),
        "layout": session.placement.name,
        "weights": shard_bytes(session.policy.model),
        "moments": moments,
        "teacher": copied,
    }


def shard_bytes(model: torch.nn.Module) -> int:
    return sum(local(p).nbytes for p in model.parameters())


def main(folder: Path, cases: dict[str, dict]) -> None:
    world = open_world(60.0)
    received = Received(world.size)
    found = {name: run_case(case, folder / name, received) for name, case in cases.items()}
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
