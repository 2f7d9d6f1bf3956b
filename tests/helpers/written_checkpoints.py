"""Checkpoints of a few numbers, written and looked at."""

from __future__ import annotations

import multiprocessing

import torch

from fastsd.checkpoint import save_checkpoint

FORK = multiprocessing.get_context("fork")


def write_light_model(folder):
    (folder / "config.json").write_text('{"model_type": "none"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 256)


def tensors_of(step):
    return {
        "master/w": torch.full((64, 32), float(step)),
        "half": torch.arange(33, dtype=torch.bfloat16) / 7 + step,
        "rng": torch.arange(100, dtype=torch.uint8),
    }


def state_of(step):
    return {
        "cursor": step,
        "rng": [3, [2**62, 1, -5], None],
        "buffer": [{"text": "é\u2028\ud800 <|im_end|>", "logprobs": [0.1 + 0.2, -1e-308, -0.0]}],
    }


def save(run, step, keep=3):
    return save_checkpoint(run, step, write_light_model, tensors_of(step), state_of(step), keep)


def assert_holds(loaded, step):
    assert loaded is not None and loaded.step == step
    for name, tensor in tensors_of(step).items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors.whole(name), tensor)
    assert loaded.state == state_of(step)
    # repr tells -0.0 from 0.0.
    assert repr(loaded.state["buffer"][0]["logprobs"]) == repr([0.1 + 0.2, -1e-308, -0.0])
