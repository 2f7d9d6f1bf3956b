"""Whether a checkpoint is of these settings, model and data, before anything is changed.

The trainer's own tensors are those that train. With adapters or frozen parts a model of another
vocabulary or depth may hold the very same ones, so a checkpoint lists every parameter's shape. Each
rank compares alone: the shapes of a sharded model are those of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastsd.config import Config
from fastsd.errors import CheckpointError
from fastsd.types import Prompt

Shapes = Mapping[str, list[int]]
# Settings that a resumed run may change: none moves a weight or says what the critic writes, but
# for guard, which may have stopped the run.
_FREE_ON_RESUME = (
    *("run", "resume", "seeds", "threads", "checkpoint", "eval", "report", "log", "filter"),
    *("guard", "critic.url", "critic.api_key_env", "critic.concurrency", "critic.timeout_s"),
    *("critic.retries", "critic.budget_s", "critic.cache", "rollout.servers", "parallel"),
    *("rollout.concurrency", "rollout.server_tokens", "rollout.timeout_s", "rollout.sync"),
)


def binding_settings(config: Config) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that saved."""
    settings = config.model_dump(mode="json")
    for name in _FREE_ON_RESUME:
        section, _, key = name.partition(".")
        settings[section].pop(key) if key else settings.pop(section)
    return settings


def refuse_other_settings(path: Path, saved: Mapping[str, Any], config: Config) -> None:
    """Raises CheckpointError naming the first section that differs. path: the checkpoint's."""
    now = binding_settings(config)
    for name in sorted(now.keys() | saved.keys()):
        if now.get(name) != saved.get(name):
            raise CheckpointError(
                f"cannot resume {path}: [{name}] was {json.dumps(saved.get(name))} and is "
                f"{json.dumps(now.get(name))}; use the saved settings or another run folder"
            )


def parameter_shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """What a checkpoint keeps of a model: the shape of each parameter by name."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def refuse_other_model(path: Path, saved: Shapes | None, model: torch.nn.Module) -> None:
    """Raises CheckpointError naming the first tensor that differs. path: the checkpoint's. saved:
    None for a checkpoint of before it was kept."""
    if saved is None:
        return
    own = parameter_shapes(model)
    names = [name for name in {**own, **saved} if own.get(name) != saved.get(name)]
    if not names:
        return
    there, here = (_shape(shapes.get(names[0])) for shapes in (saved, own))
    others = f" (and {len(names) - 1} more tensors differ)" if len(names) > 1 else ""
    raise CheckpointError(
        f"cannot resume {path}: it is of another model: {names[0]!r} is {there} in it and {here} "
        f"in the one loaded{others}; use the model that the run began with, or another run folder"
    )


def refuse_other_data(
    path: Path, records: Iterable[Mapping[str, Any]], prompts: Mapping[str, Prompt]
) -> None:
    """records: saved samples not yet trained on. Raises CheckpointError naming the first question
    that the data has no longer where it was. path: the checkpoint's."""
    for record in records:
        if record["prompt"] not in prompts:
            raise CheckpointError(
                f"cannot resume {path}: it holds responses to question {record['prompt']!r}, which "
                "the training data has no longer at that place; use the data that the run began "
                "with, or another run folder"
            )


def _shape(shape: list[int] | None) -> str:
    return "missing" if shape is None else f"{shape}"
