"""TRL's trainers beside the same with the adapter. Importing it imports TRL: 9 CPU seconds."""

from __future__ import annotations

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer, loss_utils

from bench.bench_trl_adapter import build_trainer, compare, disagreement, fused, line, save_model
from fastsd_kernels.adapters import trl as adapter

__all__ = ["SDFTTrainer", "SDPOTrainer", "adapter", "compare", "line", "loss_utils", "save_model"]

ROWS, COMPLETION = 4, 9


def build(trainer, folder, **config):
    fixed = {"rows": ROWS, "completion": COMPLETION, "max_steps": 3, "learning_rate": 1e-3}
    config = {**fixed, **config}
    return build_trainer(trainer, folder, **config)


def check_same_training(trainer, folder, **config):
    config = {"dtype": torch.float64, **config}
    theirs = build(trainer, folder, **config)
    ours = build(fused(trainer), folder, **config)
    expected, found = train(theirs), train(ours)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9, abs=1e-12)
    for mine, other in zip(found["logs"], expected["logs"], strict=True):
        for key in other.keys() - {key for key in other if key.endswith(("runtime", "second"))}:
            assert mine[key] == pytest.approx(other[key], rel=1e-6, abs=1e-9), key
    assert disagreement(found, expected)[1] <= 1e-9
    return ours, theirs


def train(trainer):
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "logs": trainer.state.log_history,
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
    }
