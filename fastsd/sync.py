"""A policy's weights as a folder that other processes load them from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TIED_HEAD = "tied_head.safetensors"


def write_weights(
    save: Callable[[Path], None], head_names: Sequence[str], folder: Path, version: int
) -> Path:
    """Writes folder/weights-VERSION, a Hugging Face folder, whole or not at all, and returns it.

    save: writes the folder that it is given. head_names: what the model calls its head, as
    `names_of_head` has it. Each version has a folder of its own: a server may still read the one
    before. Raises OSError.
    """
    place = folder / f"weights-{version}"
    temporary = folder / f".{place.name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save(temporary)
        add_tied_head(head_names, temporary)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def remove_others(weights: Path) -> None:
    """Deletes what lies beside `weights`: earlier versions, and what a killed run left behind."""
    for other in weights.parent.iterdir():
        if other != weights:
            shutil.rmtree(other)


def names_of_head(policy) -> list[str]:
    """The names under which the model has its head's weights; the embedding's too, if tied."""
    model = policy.model.get_base_model() if hasattr(policy.model, "peft_config") else policy.model
    parameters = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if parameter is policy.head_VD]


def add_tied_head(head_names: Sequence[str], folder: Path) -> None:
    """Writes a head that shares the embedding's weights once more, under the head's own name.

    vLLM on a CPU keeps a packed copy of the head, and repacks it only if it is loaded by name.
    """
    index = folder / _INDEX
    listed = json.loads(index.read_text(encoding="utf-8")) if index.exists() else None
    if listed is None:
        with safe_open(folder / _WHOLE, "pt") as file:
            file_of = dict.fromkeys(file.keys(), _WHOLE)
    else:
        file_of = listed["weight_map"]
    saved = [name for name in head_names if name in file_of]
    missing = [name for name in head_names if name not in file_of]
    if not missing or not saved:
        return
    with safe_open(folder / file_of[saved[0]], "pt") as file:
        head_VD = file.get_tensor(saved[0])
    save_file({name: head_VD for name in missing}, folder / _TIED_HEAD, metadata={"format": "pt"})
    if listed is not None:
        listed["weight_map"] |= dict.fromkeys(missing, _TIED_HEAD)
        index.write_text(json.dumps(listed), encoding="utf-8")
