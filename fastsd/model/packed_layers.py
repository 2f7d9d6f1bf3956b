"""A policy's linear layers in the form that decoding likes: packed once, read once a step.

A decode step multiplies a handful of rows by every weight, so its time is that of reading them.
While rollouts are made on a CPU, every plain `torch.nn.Linear` of the decoder and the head run
through `PackedLinear`: the weights lie in the order in which the kernel reads them, and a row's
result is the same to the bit whatever the batch. It is a copy, so it lives as long as one call of
the sampler and no longer.

Shapes: B rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsd.model.policy import Policy
from fastsd_kernels import native_library
from fastsd_kernels.packed_linear import PackedLinear


def packed_layers_name(policy: Policy) -> str:
    """ "native" where rollouts run through the C++ library, else "torch"."""
    head_VD = policy.head_VD
    packs = head_VD.device.type == "cpu" and head_VD.dtype in native_library.DTYPES
    return "native" if packs and native_library.missing() is None else "torch"


@contextmanager
def packed_layers(policy: Policy) -> Iterator[Callable[[Tensor], Tensor]]:
    """Gives hidden_BD -> logits_BV in fp32, without bias; until it ends the decoder's layers run
    packed. On a GPU, or where the C++ library is missing, they stay as they are.
    """
    head_VD = policy.head_VD.detach()
    if packed_layers_name(policy) == "torch":
        yield _torch_logits(head_VD)
        return
    layers = [module for module in policy.decoder.modules() if type(module) is torch.nn.Linear]
    before = [layer.__dict__.get("forward") for layer in layers]
    head = PackedLinear(head_VD)
    try:
        for layer in layers:
            layer.__dict__["forward"] = PackedLinear(layer.weight, layer.bias)
        yield lambda hidden_BD: head(hidden_BD, torch.float32)
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward


def _torch_logits(head_VD: Tensor) -> Callable[[Tensor], Tensor]:
    if head_VD.is_cuda and head_VD.dtype != torch.float32:  # 16-bit operands, fp32 sums and result
        return lambda hidden_BD: torch.mm(hidden_BD, head_VD.T, out_dtype=torch.float32)
    wide_VD = head_VD.float()
    return lambda hidden_BD: hidden_BD.float() @ wide_VD.T
