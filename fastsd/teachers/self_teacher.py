"""The self-teacher: the same model, shown question and feedback, with one of four sets of weights.

    live          the student's weights at this very step
    ema           their moving average, teacher <- (1 - rate) * teacher + rate * student
    frozen        the weights before the first update, as a second copy
    adapter_off   the same weights without a copy: the student with its LoRA adapters off

Whatever the kind, no gradient ever reaches it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastsd.checkpoint.tensors import copy_into
from fastsd.config.sections import TeacherConfig
from fastsd.model import Policy
from fastsd.model.packing import PrefixKeys
from fastsd.model.policy import trainable_parameters
from fastsd.types import TokenTree


class Teacher:
    """Hidden states of the self-teacher for token trees."""

    def __init__(self, student: Policy, config: TeacherConfig):
        self.config = config
        self._student = student
        copied = config.kind in ("ema", "frozen")
        self.policy = student.copy() if copied else student

    @functools.cached_property
    def _average(self) -> dict[str, Tensor]:
        """It moves by a fraction of a bf16 step per update, so it is kept in fp32. Begins as the
        teacher's own weights, which are the student's first ones until the first update."""
        if self.config.kind != "ema":
            return {}
        parameters = dict(self.policy.model.named_parameters())
        names = [name for name, _ in trainable_parameters(self._student.model)]
        return {name: parameters[name].detach().float().clone() for name in names}

    @torch.no_grad()
    def hidden(
        self,
        trees: Sequence[TokenTree],
        reads: PrefixKeys | None = None,
        fills: PrefixKeys | None = None,
    ) -> Tensor:
        """hidden_AD as Policy.hidden, without gradient."""
        with self._adapters_off():
            return self.policy.hidden(trees, reads, fills)

    @property
    def shares_weights(self) -> bool:
        """Whether the student's keys and values are the teacher's too."""
        return self.config.kind == "live"

    @property
    def head_VD(self) -> Tensor | None:
        """The teacher's own head, or None where it is the student's very tensor."""
        own = self.policy.head_VD
        return None if own is self._student.head_VD else own.detach()

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor]) -> None:
        """After each optimizer step. masters: the student's fp32 parameters by name."""
        parameters = dict(self.policy.model.named_parameters())
        for name, average in self._average.items():
            average.lerp_(masters[name].float(), self.config.ema_rate)
            parameters[name].copy_(average)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resume needs: the moving average, by parameter name."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        copy_into(self._average, tensors)
        parameters = dict(self.policy.model.named_parameters())
        for name, average in self._average.items():
            parameters[name].copy_(average)

    def _adapters_off(self):
        if self.config.kind == "adapter_off":
            return self.policy.model.disable_adapter()
        return contextlib.nullcontext()
