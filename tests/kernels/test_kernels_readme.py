"""What the kernels' README shows works as it stands there, and what it names exists."""

from __future__ import annotations

import os
import re

from places import ROOT

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastsd_kernels
from fastsd_kernels.adapters.hidden_states import hidden_states
from fastsd_kernels.testing import FP32_ERROR, relative_error

README = (ROOT / "kernels" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[-1][:40])
def test_python_blocks_run(code, capsys):
    exec(compile(code, "kernels/README.md", "exec"), {"__name__": "readme"})
    assert bool(capsys.readouterr().out.strip()) == ("print(" in code)


def test_the_first_example_is_ten_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 10


def test_the_recipe_gives_a_models_own_loss_and_gradients():
    """PPO without a clip plus an entropy bonus, through a Llama, against autograd on its logits."""
    scope: dict = {}
    exec(next(code for code in BLOCKS if "def head_outputs" in code), scope)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    ))  # fmt: skip
    ids, mask = torch.randint(0, 40, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    labels, advantage = ids.roll(-1, dims=1), torch.randn(2, 7)
    terms = {"policy_weight_T": advantage.flatten(), "entropy_weight_T": torch.full((14,), 0.1)}
    hidden = hidden_states(model, ids, mask)
    loss, logprobs, entropies = scope["head_outputs"](
        hidden, model.lm_head.weight, labels, 0.8, terms
    )
    found = torch.autograd.grad(loss, list(model.parameters()))

    log_p = (model(input_ids=ids, attention_mask=mask).logits / 0.8).log_softmax(-1)
    picked = log_p.gather(2, labels[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = -(advantage * picked).sum() - 0.1 * entropy.sum()
    exact = torch.autograd.grad(expected, list(model.parameters()))
    for mine, other in [(loss, expected), (logprobs, picked), (entropies, entropy),
                        *zip(found, exact, strict=True)]:  # fmt: skip
        # Both sides are fp32, so the error of each is allowed.
        assert relative_error(mine.detach(), other.detach()) <= 2 * FP32_ERROR
    scored = scope["head_outputs"](hidden.detach(), model.lm_head.weight, labels, 0.8)
    assert scored[0] is None and relative_error(scored[1], logprobs) <= FP32_ERROR


def test_named_functions_and_files_exist():
    for name in ("fused_linear_loss", "fused_linear_statistics", "sample_tokens"):
        assert f"`{name}" in README and name in fastsd_kernels.__all__
    for file in re.findall(r"`(tests/[\w./]+)`", README):
        assert (ROOT / file).exists(), file
    for module in re.findall(r"python -m (bench\.\w+)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
