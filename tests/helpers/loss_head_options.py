"""Every option of the loss head, and one call's loss, statistics and gradients."""

from __future__ import annotations

import itertools

import torch

from fastsd_kernels import fused_linear_loss

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "sampled_token")
VALUES = ("loss", "divergence_T", "student_logprob_T", "teacher_logprob_T", "entropy_T")
LEAVES = ("student_TD", "head_VD", "bias_V")


def every_option():
    for divergence, top_k, clip in itertools.product(DIVERGENCES, (None, (7, True), (7, False)),
                                                     (None, 0.05)):  # fmt: skip
        if divergence == "sampled_token" and (top_k or clip):
            continue
        options = {"divergence": divergence, "beta": 0.3, "entry_clip": clip}
        yield options | ({"top_k": top_k[0], "tail": top_k[1]} if top_k else {})
    yield {"divergence": "jsd", "beta": 0.0}
    yield {"divergence": "jsd", "beta": 1.0}
    yield {"softcap": 2.0, "temperature": 1.3, "logit_scale": 0.7, "clip": 0.2}
    yield {"temperature": 0.6, "clip": 0.2}


OPTIONS = list(every_option())


def evaluate(x: dict, impl: str, upstream: float = 1.0, **options) -> dict[str, torch.Tensor]:
    """Loss, statistics and gradients of one call, all detached."""
    leaves = {k: x[k].detach().clone().requires_grad_() for k in LEAVES if x.get(k) is not None}
    out = fused_linear_loss(**{**x, **leaves}, **options, impl=impl)
    (out.loss * upstream).backward()
    found = {name: getattr(out, name) for name in VALUES if getattr(out, name) is not None}
    found |= {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    found |= {
        name: getattr(out, name)
        for name in ("policy_clipped_T", "entry_clipped_T")
        if getattr(out, name) is not None
    }
    return {name: value.detach() for name, value in found.items()}


def widened(x: dict) -> dict:
    """The same inputs in fp64: the reference then is the oracle of the narrow call."""
    return {k: v.detach().double() if v.is_floating_point() else v for k, v in x.items()}
