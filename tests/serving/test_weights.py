"""Weights as other processes take them: what is sent is the policy's Hugging Face folder."""

import json

import pytest
import sync_ranks_worker
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, build_tiny, load_tiny

from fastsd.serving.weights import PolicyWeights, names_of_head, write_weights

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
MODELS = [
    *((name, {}) for name in ("llama", "qwen3", "gemma3_text", "qwen3_moe", "qwen2")),
    ("llama", {"lora": LORA}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, options", MODELS)
def test_what_is_sent_is_the_hugging_face_folder(tmp_path, name, options, dtype):
    """Tied and untied heads, merged adapters, experts that lie in one tensor, biases."""
    assert ARCHITECTURES.get(name) is not None
    policy = load_tiny(build_tiny(name, tmp_path / "model"), dtype, **options)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    place = write_weights(policy.save, names_of_head(policy), tmp_path, 0)
    saved = {n: t for file in place.glob("*.safetensors") for n, t in load_file(file).items()}
    weights = PolicyWeights(policy)
    for _ in range(2):
        sent = list(weights)
        assert len(sent) == len(saved) and dict(sent).keys() == saved.keys()
        assert "lm_head.weight" in saved
        for name, tensor in sent:
            assert tensor.dtype == saved[name].dtype and torch.equal(tensor, saved[name]), name
            assert not tensor.requires_grad
        assert [(n, t.dtype, tuple(t.shape)) for n, t in sent] == weights.metadata()
    after = policy.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_two_ranks_send_what_one_saves(tmp_path):
    """Spread weights: tied, untied with a sharded head, adapters; the first rank sends alone."""
    run_ranks(sync_ranks_worker.main, tmp_path)
    for case in ("tied", "untied", "lora"):
        assert json.loads((tmp_path / f"{case}.json").read_text()) == {"differ": [], "same": True}
