"""A policy's weights as a folder that other processes load them from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

_INDEX = "model.safetensors.index.json"
_TIED_HEAD = "tied_head.safetensors"


def write_weights(policy, folder: Path, version: int) -> Path:
    """Writes folder/weights-VERSION, a Hugging Face folder, whole or not at all, and returns it.

    Each version has a folder of its own: a server may still read the one before. Raises OSError.
    """
    place = folder / f"weights-{version}"
    temporary = folder / f".{place.name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        policy.save(temporary)
        add_tied_head(policy, temporary)
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


def add_tied_head(policy, folder: Path) -> None:
    """Writes a head that shares the embedding's weights once more, under the head's own name.

    vLLM on a CPU keeps a packed copy of the head, and repacks it only if it is loaded by name.
    """
    model = policy.model.get_base_model() if hasattr(policy.model, "peft_config") else policy.model
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in parameters if parameter is policy.head_VD]
    index = folder / _INDEX
    listed = json.loads(index.read_text(encoding="utf-8")) if index.exists() else None
    if listed is None:
        with safe_open(folder / "model.safetensors", "pt") as file:
            saved = set(file.keys())
    else:
        saved = set(listed["weight_map"])
    head_VD = policy.head_VD.detach().cpu().contiguous()
    missing = {name: head_VD for name in names if name not in saved}
    if not missing:
        return
    save_file(missing, folder / _TIED_HEAD, metadata={"format": "pt"})
    if listed is not None:
        listed["weight_map"] |= dict.fromkeys(missing, _TIED_HEAD)
        index.write_text(json.dumps(listed), encoding="utf-8")
