"""A policy's weights as other processes take them: a folder, or one tensor after another.

Both have the names, types and values of the policy's Hugging Face folder, adapters merged. A head
that shares the embedding's weights comes once more under its own name: vLLM on a CPU keeps a packed
copy of the head, and repacks it only if it is loaded by name.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsd.serving.server import RolloutError, VllmServer

if TYPE_CHECKING:
    import httpx

    from fastsd.serving.fleet import Fleet

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TIED_HEAD = "tied_head.safetensors"
# What comes before "self_attn" in "model.layers.0.self_attn.q_proj.weight".
_LAYER = re.compile(r".*?\.\d+\.")


class ServedPolicy(Protocol):
    """What is read of a policy (fastsd/model/)."""

    model: nn.Module

    @property
    def head_VD(self) -> Tensor: ...

    @property
    def device(self) -> torch.device: ...


class PlacedWeights(Protocol):
    """What is asked of a run's weights, wherever they lie (fastsd/parallel/)."""

    def saver(self) -> Callable[[Path], None]:
        """What writes the model as a Hugging Face folder, on rank 0. Collective."""
        ...


class SharedFiles:
    """Hands weights to servers through a folder that they can read under the same path.

    folder: where each version is written. Asked for while the policy's weights are whole.
    """

    name = "shared files"

    def __init__(self, policy: ServedPolicy, folder: Path):
        self._head_names = names_of_head(policy)
        self._folder = folder.resolve()
        self._last: Path | None = None

    def collect(self, weights: PlacedWeights) -> Callable[[Fleet, int], None]:
        """What gives all living servers of a fleet the present weights, as a version; a server that
        fails is lost. Collective where the weights are spread over ranks; the first calls what it
        is given, all weights gathered. Raises RolloutError."""
        save = weights.saver()
        return lambda fleet, version: self._give(fleet, version, save)

    def settle(self) -> None:
        """The servers have been seen to hold what they were given last."""
        if self._last is not None:
            remove_others(self._last)

    def _give(self, fleet: Fleet, version: int, save: Callable[[Path], None]) -> None:
        try:
            place = self._last = write_weights(save, self._head_names, self._folder, version)
        except OSError as error:
            raise RolloutError(f"{self._folder}: no weights for the servers: {error}") from error

        async def load(client: httpx.AsyncClient, server: VllmServer) -> None:
            await server.load_weights(client, place)

        fleet.everywhere(load, fleet.living)


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


def names_of_head(policy: ServedPolicy) -> list[str]:
    """The names under which the model has its head's weights; the embedding's too, if tied."""
    parameters = without_adapters(policy.model).named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if parameter is policy.head_VD]


def add_tied_head(head_names: Sequence[str], folder: Path) -> None:
    """Writes a head that shares the embedding's weights once more, under the head's own name."""
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


def without_adapters(model: Any) -> Any:
    """The Hugging Face model in a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


class TensorMeta(NamedTuple):
    """A tensor of a Hugging Face folder: its name, type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicyWeights:
    """The tensors of a policy's Hugging Face folder one after another: what vLLM's trainer engine
    takes for its WeightSource. Adapters are merged a layer at a time. All weights must be whole on
    this process; iterating sends nothing to other ranks."""

    def __init__(self, policy: ServedPolicy):
        self._model = without_adapters(policy.model)

    def metadata(self) -> list[TensorMeta]:
        """What iterating gives, in its order; nothing is merged or copied for it."""
        return [TensorMeta(n, t.dtype, tuple(t.shape)) for n, t in self._saved(_empty)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._saved(_merged)

    def _saved(
        self, weights_of: Callable[[nn.Module], Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """As `save_pretrained` names and splits them: experts that the model keeps in one tensor
        are many in a folder. A whole decoder layer at once, since what belongs together lies there.
        """
        from transformers.core_model_loading import revert_weight_conversion

        tensors = _tensors(self._model, weights_of)
        for _, layer in itertools.groupby(tensors, lambda named: _layer_of(named[0])):
            with torch.no_grad():
                saved = revert_weight_conversion(self._model, dict(layer))
            yield from saved.items()


def _tensors(
    model: nn.Module, weights_of: Callable[[nn.Module], Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Named as without adapters. Not from `state_dict()`: FSDP spreads gathered weights for it."""
    adapted = None
    for path, module in model.named_modules():
        if adapted is not None and path.startswith(adapted):
            continue
        start = f"{path}." if path else ""
        adapted = start if hasattr(module, "base_layer") else None
        for name, tensor in weights_of(module).items():
            yield start + name, tensor


def _own(module: nn.Module) -> dict[str, Tensor]:
    passing = module._non_persistent_buffers_set
    buffers = {n: b for n, b in module.named_buffers(recurse=False) if n not in passing}
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def _empty(module: nn.Module) -> dict[str, Tensor]:
    own = _own(getattr(module, "base_layer", module))
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}


def _merged(module: nn.Module) -> dict[str, Tensor]:
    layer: Any = module
    if hasattr(module, "base_layer"):
        layer = copy.deepcopy(module)
        layer.merge()
        layer = layer.base_layer
    return {name: tensor.detach() for name, tensor in _own(layer).items()}


def _layer_of(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else ""
