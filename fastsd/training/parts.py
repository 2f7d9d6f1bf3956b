"""What one run is made of, put together from a configuration, and where the run stands."""

from __future__ import annotations

from pathlib import Path

import torch

from fastsd.conditions import CONDITIONS
from fastsd.config import Config
from fastsd.errors import FastsdError
from fastsd.evaluation.solver import Solver
from fastsd.parallel.placement import place_weights, refuse_ranks
from fastsd.prompts.sources import required_fields
from fastsd.runtime.agreement import refuse_other_start
from fastsd.runtime.hardware import resolve_device, resolve_dtype
from fastsd.runtime.phases import PhaseClock
from fastsd.runtime.signals import SignalGate
from fastsd.runtime.world import World, open_world
from fastsd.teachers.self_teacher import Teacher
from fastsd.training.feedback import feedback_maker
from fastsd.training.guards import Guard
from fastsd.training.optimizer import Optimizer
from fastsd.training.preflight import check_prompts, refuse_other_inputs
from fastsd.types import Sample
from fastsd_kernels.loss_head import implementation_choice


class Parts(Solver):
    """A solver and what it learns with: everything one (condition, seed) run needs.

    Order is part of a run's bits: torch is seeded before the model is opened, because fresh
    adapters are drawn from its random state. Raises FastsdError where the run cannot start.
    """

    def __init__(self, config: Config, run_dir: Path):
        self.run_dir = run_dir
        torch.manual_seed(config.seed)
        self.world = open_world(config.parallel.timeout_s, config.device)
        refuse_other_start(self.world, config.model_dump(mode="json"))
        refuse_ranks(config, self.world)
        self.loss_head = _loss_head(config, self.world)
        super().__init__(config, run_dir, required_fields(config), self.world)
        asks = CONDITIONS[config.condition].critic
        self.maker = feedback_maker(config, self.critic if asks else None)
        self.teacher = Teacher(self.policy, config.teacher) if self.maker.template else None
        refuse_other_inputs(self, self.world)
        self.placement = place_weights(config, self.policy, self.teacher, self.world)
        if self.placement.shards_head:
            self.loss_head = "sharded by vocabulary"
        self.guard = Guard(config.guard)
        self.optimizer = Optimizer(self.policy.model, config.optim, self.guard.is_spike, self.world)
        self.clock = PhaseClock(self.policy.device)
        self.gate = SignalGate(self.world)
        self.step = 0
        self.cursor = 0
        self.buffer: list[Sample] = []
        check_prompts(self, config)

    def where(self) -> str:
        """The step and phase under way, for a message."""
        return f" in phase {self.clock.current!r} of update {self.step + 1}"


def _loss_head(config: Config, world: World) -> str:
    """The loss head that will run; an implementation that is not here is the user's to change."""
    device = resolve_device(config.device, world.local_rank)
    dtype = resolve_dtype(config.model.dtype, device)
    try:
        name, why = implementation_choice(config.loss.impl, device, dtype)
    except (RuntimeError, ValueError) as error:
        raise FastsdError(f"loss.impl: {error}") from error
    return f"{name} ({why})"
