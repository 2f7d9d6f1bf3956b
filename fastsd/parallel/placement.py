"""One run's weights over its ranks: FSDP2 with a decoder layer as the unit, the rest as the root.

Every rank keeps 1/N of each tensor: fp32 masters and what AdamW needs of them. A layer is gathered
before its forward and its backward and freed after each; embedding, final norm and head are one
unit that is gathered once a step, because the loss head reads the head's weight between forward and
backward. Where the head is sharded (`sharded_head.head_layout`) it is never gathered in training;
one that is tied to the embedding is let go of in between. Gradients are summed over ranks, in fp32
unless parallel.reduce_dtype says otherwise, for the loss is divided by the tokens of the whole step
already. Compute is in the model's own type, as in one process.

While rollouts are made, every rank holds all weights: ranks then decode each at its own pace. So
a rank's memory must hold the model once in its compute type, beside its part of the masters.

`OneProcess` is the same for one process, where nothing is spread.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsd.config import Config
from fastsd.errors import FastsdError
from fastsd.model import Policy
from fastsd.parallel.loss_head import Head, Layout, head_layout, sharded_head_loss
from fastsd.runtime.shards import whole
from fastsd.runtime.signals import SignalGate
from fastsd.runtime.world import World
from fastsd.teachers.self_teacher import Teacher
from fastsd.types import Prompt
from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head import LossHeadOutput

T = TypeVar("T")


class OneProcess:
    """The weights of a run that is one process."""

    shards_head = False

    def __init__(self, policy: Policy, loss_impl: str = "auto"):
        self.policy = policy
        self._loss_impl = loss_impl

    @property
    def name(self) -> str | None:
        """How the weights lie, for the run's header; None where there is nothing to say."""
        return None

    def loss_head(
        self, student_TD: Tensor, target_T: Tensor, options: Mapping[str, Any]
    ) -> LossHeadOutput:
        """`fused_linear_loss` of this rank's rows with the policy's head; options: its others."""
        given = {**self.policy.head_options(), **options}
        head_VD, impl = self.policy.head_VD, self._loss_impl
        return fused_linear_loss(student_TD, head_VD, target_T, impl=impl, **given)

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy runs without a word to other ranks."""
        return contextlib.nullcontext()

    def share_out(
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

    def saver(self) -> Callable[[Path], None]:
        """What writes the model as a Hugging Face folder, on rank 0."""
        return self.policy.save


class Fsdp(OneProcess):
    """The weights of policy and teacher over the ranks of `world`; collective, and so are its
    methods. Raises ModelError where the sharded model cannot run."""

    def __init__(self, config: Config, policy: Policy, teacher: Teacher | None, world: World):
        super().__init__(policy, config.loss.impl)
        self.world = world
        self._layout: Layout
        self._layout, self._why = head_layout(config, _head(policy, teacher), world.size)
        self.shards_head = self._layout == "sharded"
        reduced = torch.float32 if config.parallel.reduce_dtype == "float32" else policy.dtype
        self._skeleton = _skeleton(policy.model) if world.leads else None
        own = [] if teacher is None or teacher.policy is policy else [teacher.policy]
        self._policies = [policy, *own]
        for each in self._policies:
            _shard(each, world, reduced, self._layout)
            # FSDP takes the first module that runs for the root: the whole, not a layer.
            each.try_out()
        self.release()

    @property
    def name(self) -> str:
        return f"FSDP2 over {self.world.size} ranks, head {self._layout} ({self._why})"

    def loss_head(
        self, student_TD: Tensor, target_T: Tensor, options: Mapping[str, Any]
    ) -> LossHeadOutput:
        if not self.shards_head:
            return super().loss_head(student_TD, target_T, options)
        return sharded_head_loss(student_TD, target_T, self.policy, self.world, options)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        root = _root(self.policy)
        root.set_reshard_after_forward(False)
        for unit in _units(self.policy):
            unit.unshard()
        try:
            yield
            # FSDP gathers ahead, in a backward pass, what ran before: the same on an idle rank.
            self.policy.try_out()
        finally:
            _set_resharding(self.policy, self._layout)
            for unit in _units(self.policy):
                unit.reshard()

    def share_out(
        self,
        prompts: Sequence[Prompt],
        each: int,
        work: Callable[[list[Prompt]], list[T]],
        gate: SignalGate,
    ) -> list[T]:
        """Question n of the distinct ones to rank n mod the number of ranks."""
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


def place_weights(
    config: Config, policy: Policy, teacher: Teacher | None, world: World
) -> OneProcess:
    """Spreads the weights over the ranks, where there are more than one. Before the optimizer.

    Raises FastsdError where nothing but the head trains, ModelError as Fsdp does.
    """
    if world.size == 1:
        return OneProcess(policy, config.loss.impl)
    _refuse_head_alone(policy)
    return Fsdp(config, policy, teacher, world)


def _shard(policy: Policy, world: World, reduced: torch.dtype, layout: Layout) -> None:
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    compute = policy.dtype
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    root, mesh = _root(policy), world.mesh(policy.device.type)
    precision = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=reduced, cast_forward_inputs=False
    )
    apart = [policy.head] if layout == "sharded" and not _is_tied(policy) else []
    for module in (*policy.decoder.layers, *apart, root):
        fully_shard(module, mesh=mesh, mp_policy=precision)
    _set_resharding(policy, layout)
    for unit in _units(policy):
        unit.set_gradient_divide_factor(1.0)
        # gloo has no reduction that multiplies first.
        unit.set_force_sum_reduction_for_comms(True)
    # An expert without tokens on one rank has a gradient on another.
    for unit in (*policy.decoder.layers, root):
        unit.set_reduce_scatter_unused_params(True, recurse=False)
    root.hidden_rows = policy.hidden_rows
    register_fsdp_forward_method(root, "hidden_rows")
    policy.gathering, policy.gathered_dtype = root.hidden_rows, compute


def _refuse_head_alone(policy: Policy) -> None:
    heads = {id(parameter) for parameter in policy.head.parameters()}
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    if not _is_tied(policy) and all(id(parameter) in heads for parameter in trained):
        raise FastsdError(
            "model.freeze leaves nothing but the head to train, which many processes cannot: their "
            "gradients meet below it; train with one process, or free the last layer"
        )


def _root(policy: Policy) -> Any:
    """The causal language model: below the adapters' wrapper, above the decoder."""
    model = policy.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _units(policy: Policy) -> list[Any]:
    """What is gathered as a whole; the head too, where it is none of the root's weights."""
    from torch.distributed.fsdp import FSDPModule

    apart = [policy.head] if isinstance(policy.head, FSDPModule) else []
    return [*policy.decoder.layers, *apart, _root(policy)]


def _set_resharding(policy: Policy, layout: Layout) -> None:
    """When gathered weights are let go of: a layer's at once, the root's at the end of a step."""
    root = _root(policy)
    root.set_reshard_after_forward(True)
    if layout == "gathered" or not _is_tied(policy):
        root.set_reshard_after_forward(False, recurse=False)
        root.set_reshard_after_backward(False, recurse=False)


def _is_tied(policy: Policy) -> bool:
    return policy.head_VD is policy.decoder.get_input_embeddings().weight


def _head(policy: Policy, teacher: Teacher | None) -> Head:
    own = teacher is not None and teacher.head_VD is not None
    return Head(
        vocabulary=len(policy.head_VD),
        compute_bytes=policy.dtype.itemsize,
        tied=_is_tied(policy),
        trains=policy.head_VD.requires_grad,
        streams=1 if teacher is None else 2,
        heads=2 if own else 1,
        device=policy.device.type,
    )


def _skeleton(model: torch.nn.Module) -> torch.nn.Module:
    """The model without storage for its parameters: what a checkpoint is written from."""
    empty = {id(p): torch.nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)
