"""What the tests of the loss head's operators share: implementations, calls, one training step."""

from __future__ import annotations

import torch

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head import implementation_choice
from fastsd_kernels.loss_head.contract import Inputs, Options
from fastsd_kernels.testing import loss_head_inputs, relative_error

LEAVES = ("student_TD", "head_VD", "bias_V")
FP64_ERROR = 1e-12  # sums of up to T V terms in another order, u = 1.1e-16


def can_run(impl: str) -> bool:
    try:
        return implementation_choice(impl, "cpu", torch.float32)[0] == impl
    except RuntimeError:
        return False


HERE = [name for name in ("reference", "chunked", "native", "triton") if can_run(name)]
OPTION_SETS = [
    {},
    {"divergence": "reverse_kl", "clip": 0.2, "softcap": 2.0, "temperature": 1.3},
    {"divergence": "jsd", "beta": 0.3, "entry_clip": 0.05, "without": ("bias_V",)},
    {"top_k": 5, "tail": False, "without": ("divergence_weight_T",)},
    {"divergence": "sampled_token", "clip": 0.1},
    {"without": ("teacher_TD", "divergence_weight_T", "old_logprob_T"), "logit_scale": 0.5},
]
OPTION_IDS = [str(options) for options in OPTION_SETS]


def case(options: dict, rows=7, width=6, vocabulary=23, dtype=torch.float32, seed=0):
    """(tensor arguments, settings) of one call; some rows do not count."""
    x = loss_head_inputs(rows, width, vocabulary, dtype, seed)
    for name in ("divergence_weight_T", "policy_weight_T", "entropy_weight_T"):
        x[name][::3] = 0
    settings = dict(options)
    for name in settings.pop("without", ()):
        del x[name]
    if "clip" not in settings:
        x.pop("old_logprob_T", None)
    return x, settings


def loss_arguments(x: dict, settings: dict, impl: str, wanted: list[bool]) -> tuple:
    inputs, options = Inputs(**x), Options(**settings)
    return (*vars(inputs).values(), *vars(options).values(), impl, wanted)


def step(x: dict, call=fused_linear_loss, upstream: float = 1.0, **settings) -> dict:
    """Loss and gradients from fresh leaves, detached."""
    leaves = {k: x[k].detach().clone().requires_grad_() for k in LEAVES if k in x}
    loss = call(**{**x, **leaves}, **settings).loss
    (loss * upstream).backward()
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def close(found: dict, expected: dict, budget: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= budget, name
