"""What packed token trees are compared with: every branch a full row of its own, one at a time,
through the Hugging Face model with its own eager attention."""

from __future__ import annotations

import contextlib
import sys

import torch


def unpacked_hidden(policy, trees):
    """As Policy.hidden, by the definition."""
    rows = []
    with own_attention(policy):
        for tree in trees:
            for branch in tree.branches:
                ids = [*tree.prefix_ids, *branch.context_ids, *branch.response_ids]
                out = policy.decoder(input_ids=torch.tensor([ids]), use_cache=False)
                rows.append(out.last_hidden_state[0, -len(branch.response_ids) - 1 : -1])
    return torch.cat(rows)


@contextlib.contextmanager
def own_attention(policy):
    """Inside, the model runs transformers' eager attention."""
    model = policy.model.get_base_model() if hasattr(policy.model, "peft_config") else policy.model
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def everything_in_fp64(policy, monkeypatch):
    """Hugging Face's norms, softmaxes and routers go through fp32 also in an fp64 model: in the
    modules that define this one they go through fp64 from here on."""

    class Fp64Torch:
        def __getattr__(self, name):
            return torch.float64 if name in ("float32", "float") else getattr(torch, name)

    for module in {type(m).__module__ for m in policy.decoder.modules()}:
        if module.startswith("transformers.models."):
            monkeypatch.setattr(sys.modules[module], "torch", Fp64Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(policy.config, "_experts_implementation", "eager")  # no fp64 grouped GEMM
