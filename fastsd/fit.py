"""Whether a checkpoint is of the model and the data that were loaded, before anything is changed.

The trainer's own tensors are those that train. With adapters or frozen parts a model of another
vocabulary or depth may hold the very same ones, so a checkpoint lists every parameter's shape. Each
rank compares alone: the shapes of a sharded model are those of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastsd.types import CheckpointError, Prompt

Shapes = Mapping[str, list[int]]


def parameter_shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """What a checkpoint keeps of a model: the shape of each parameter by name."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def refuse_other_model(path: Path, saved: Shapes, model: torch.nn.Module) -> None:
    """Raises CheckpointError naming the first tensor that differs. path: the checkpoint's."""
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
