"""fp32 linear layers on x86 through oneDNN, which torch ships beside the library that it calls.

torch multiplies fp32 matrices on a CPU with MKL, which leaves AVX-512 unused on processors that are
not Intel's: 110 GFLOP/s a core on a Zen 5 where oneDNN in the same torch reaches 190 to 250, in
either direction (LOG.md). bf16 goes through oneDNN anyway.

    y = x W^T + b,   dx = dy W,   dW = dy^T x,   db = sum of dy's rows

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import platform
from functools import partial

import torch
from torch import Tensor


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        return onednn_product(x_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx, grad_TN: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TK, weight_NK = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            onednn_product(grad_TN, weight_NK.T) if for_x else None,
            onednn_product(grad_TN.T, x_TK.T) if for_weight else None,
            grad_TN.sum(0) if for_bias else None,
        )


def onednn_product(left_TK: Tensor, right_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """left right^T + bias, [T, N]: fp32 on a CPU, see `takes_onednn`."""
    return torch.ops.mkldnn._linear_pointwise(left_TK, right_NK, bias_N, "none", [], "")


def onednn_linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`, x: [..., K]: fp32 on a CPU by oneDNN, differentiable once; else as ever."""
    if layer.weight.dtype != torch.float32 or not layer.weight.is_cpu:  # the model was moved
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    out_TN = _Linear.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
    return out_TN.unflatten(0, x.shape[:-1])


def takes_onednn(weight: Tensor) -> bool:
    """fp32 on an x86 CPU, in a torch that has oneDNN."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    has = x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops, "mkldnn")
    return has and weight.device.type == "cpu" and weight.dtype == torch.float32


def use_onednn(model: torch.nn.Module) -> None:
    """Every plain linear layer of the model that can runs `onednn_linear` from now on."""
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and takes_onednn(layer.weight):
            # On the instance: weights, names and checkpoints stay as they are, and a deep copy's
            # partial refers to the copied layer.
            layer.__dict__["forward"] = partial(onednn_linear, layer)
