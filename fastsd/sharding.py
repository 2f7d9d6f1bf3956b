"""One run's weights over its ranks: FSDP2 with a decoder layer as the unit, the rest as the root.

Every rank keeps 1/N of each tensor: fp32 masters and what AdamW needs of them. A layer is gathered
before its forward and its backward and freed after each; embedding, final norm and head are one
unit that stays gathered from the forward to the end of the backward, because the loss head reads
the head's weight between the two. Gradients are summed over ranks in fp32, for the loss is divided
by the tokens of the whole step already. Compute is in the model's own type, as in one process.

While rollouts are made, every rank holds all weights: ranks then decode each at its own pace. So
a rank's memory must hold the model once in its compute type, beside its part of the masters.

`Replica` is the same for one process, where nothing is spread.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsd.config import Config
from fastsd.interrupt import SignalGate
from fastsd.model import Policy
from fastsd.sharded_checkpoint import write_state
from fastsd.shards import whole
from fastsd.teacher import Teacher
from fastsd.types import FastsdError, Prompt
from fastsd.world import World

T = TypeVar("T")


class Replica:
    """The weights of a run that is one process."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @property
    def name(self) -> str | None:
        """How the weights lie, for the run's header; None where there is nothing to say."""
        return None

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy runs without a word to other ranks."""
        return contextlib.nullcontext()

    def spread(
        self,
        prompts: Sequence[Prompt],
        each: int,
        work: Callable[[list[Prompt]], list[T]],
        gate: SignalGate,
    ) -> list[T]:
        """`work(prompts)`, which gives `each` items for every prompt in order, done by the ranks
        together: all items, on every rank. Prompts of one id stay on one, for they are told apart
        by their order. gate: is open while a rank works."""
        return work(list(prompts))

    def release(self) -> None:
        """Frees what the forwards of a step gathered."""

    def state(self, tensors: Mapping[str, Tensor], run_dir: Path) -> Mapping[str, Tensor] | Path:
        """What `checkpoint.save_checkpoint` is given: whole tensors, or their file in run_dir."""
        return tensors

    def saver(self) -> Callable[[Path], None]:
        """What writes the model as a Hugging Face folder, on rank 0."""
        return self.policy.save


class Sharded(Replica):
    """The weights of policy and teacher over the ranks of `world`; collective, and so are its
    methods. Raises ModelError where the sharded model cannot run."""

    def __init__(self, policy: Policy, teacher: Teacher | None, world: World):
        super().__init__(policy)
        self.world = world
        self._skeleton = _skeleton(policy.model) if world.leads else None
        own = [] if teacher is None or teacher.policy is policy else [teacher.policy]
        self._policies = [policy, *own]
        for each in self._policies:
            _shard(each, world)
            # FSDP takes the first module that runs for the root: the whole, not a layer.
            each.try_out()
        self.release()

    @property
    def name(self) -> str:
        return f"FSDP2 over {self.world.size} ranks, head gathered"

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        root = _root(self.policy)
        root.set_reshard_after_forward(False)
        for unit in _units(self.policy):
            unit.unshard()
        try:
            yield
        finally:
            root.set_reshard_after_forward(True)
            root.set_reshard_after_forward(False, recurse=False)
            for unit in _units(self.policy):
                unit.reshard()

    def spread(
        self,
        prompts: Sequence[Prompt],
        each: int,
        work: Callable[[list[Prompt]], list[T]],
        gate: SignalGate,
    ) -> list[T]:
        distinct = dict.fromkeys(prompt.id for prompt in prompts)
        rank_of = {name: n % self.world.size for n, name in enumerate(distinct)}
        shares: list[list[int]] = [[] for _ in range(self.world.size)]
        for i, prompt in enumerate(prompts):
            shares[rank_of[prompt.id]].append(i)
        mine = [prompts[i] for i in shares[self.world.rank]]

        def alone() -> list[T]:
            with gate.opened():
                return work(mine) if mine else []

        gate.agree()
        with self.gathered():
            found = self.world.together(alone)
        items: list[list[T]] = [[] for _ in prompts]
        for share, got in zip(shares, found, strict=True):
            for n, i in enumerate(share):
                items[i] = got[each * n : each * (n + 1)]
        return [item for group in items for item in group]

    def release(self) -> None:
        for policy in self._policies:
            _root(policy).reshard()

    def state(self, tensors: Mapping[str, Tensor], run_dir: Path) -> Path:
        return write_state(run_dir / ".state.safetensors", tensors, self.world)

    def saver(self) -> Callable[[Path], None]:
        types = {} if self._skeleton is None else dict(self._skeleton.named_parameters())
        weights = {}
        for name, parameter in self.policy.model.named_parameters():
            full = whole(parameter.detach())
            if self._skeleton is not None:
                weights[name] = torch.nn.Parameter(full.cpu().to(types[name].dtype), False)
        if self._skeleton is None:
            return lambda folder: None
        # A copy of the skeleton that holds these weights, its ties too.
        filled = {id(empty): weights[name] for name, empty in types.items()}
        return Policy(copy.deepcopy(self._skeleton, filled), self.policy.tokenizer).save


def refuse_ranks(config: Config, world: World) -> None:
    """Raises FastsdError for settings that many processes cannot have."""
    if world.size == 1:
        return
    prompts = config.rollout.prompts_per_step
    if prompts < world.size:
        raise FastsdError(
            f"rollout.prompts_per_step = {prompts}, but torchrun started {world.size} processes, "
            "which share the questions of a step: start fewer, or raise it"
        )


def place_weights(policy: Policy, teacher: Teacher | None, world: World) -> Replica:
    """Spreads the weights over the ranks, where there are more than one. Before the optimizer."""
    return Replica(policy) if world.size == 1 else Sharded(policy, teacher, world)


def _shard(policy: Policy, world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    compute = policy.dtype
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    root, mesh = _root(policy), init_device_mesh(policy.device.type, (world.size,))
    precision = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in policy.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(root, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for unit in _units(policy):
        unit.set_gradient_divide_factor(1.0)
        # gloo has no reduction that multiplies first.
        unit.set_force_sum_reduction_for_comms(True)
    # An expert without tokens on one rank has a gradient on another.
    root.set_reduce_scatter_unused_params(True)
    root.hidden_rows = partial(_differentiable_rows, policy.hidden_rows)
    register_fsdp_forward_method(root, "hidden_rows")
    policy.gathering, policy.gathered_dtype = root.hidden_rows, compute


def _differentiable_rows(rows: Callable[..., Tensor], *args: Any, **inputs: Any) -> Tensor:
    hidden_AD = rows(*args, **inputs)
    if torch.is_grad_enabled() and not hidden_AD.requires_grad:
        raise FastsdError(
            "model.freeze leaves nothing but the head to train, which many processes cannot: their "
            "gradients meet below it; train with one process, or free the last layer"
        )
    return hidden_AD


def _root(policy: Policy) -> Any:
    """The causal language model: below the adapters' wrapper, above the decoder."""
    model = policy.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _units(policy: Policy) -> list[Any]:
    return [*policy.decoder.layers, _root(policy)]


def _skeleton(model: torch.nn.Module) -> torch.nn.Module:
    """The model without storage for its parameters: what a checkpoint is written from."""
    empty = {id(p): torch.nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)
