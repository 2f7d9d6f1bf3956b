"""One rank of test_sync.py.

Each case leaves FOLDER/CASE.json: names of which the tensors that would be sent differ from the
Hugging Face folder's, and whether announced and sent tensors are the same.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import build_tiny, load_tiny

from fastsd.config import Config
from fastsd.parallel.placement import place_weights
from fastsd.runtime.world import open_world
from fastsd.serving.weights import PolicyWeights, names_of_head, write_weights

CASES = {
    "tied": ("llama", "gathered", {}),
    "untied": ("qwen3", "sharded", {}),
    "lora": ("llama", "gathered", {"lora": {"r": 2, "target_modules": ["q_proj"]}}),
}


def check(case: str, place: Path) -> None:
    name, head, options = CASES[case]
    world = open_world(60.0)
    world.lead(lambda: build_tiny(name, place / case))
    policy = load_tiny(place / case, torch.float32, **options)
    config = Config(
        condition="grpo",
        model={"name": str(place / case)},
        data={"task": "chain_sum"},
        parallel={"head": head},
    )
    head_names = names_of_head(policy)
    weights = place_weights(config, policy, None, world)
    save = weights.saver()

    def compare() -> dict:
        folder = write_weights(save, head_names, place / "served", 0)
        files = folder.glob("*.safetensors")
        saved = {n: t for file in files for n, t in load_file(file).items()}
        sent = list(PolicyWeights(policy))
        told = [(n, t.dtype, tuple(t.shape)) for n, t in sent]
        equal = [n for n, t in sent if n in saved and torch.equal(t, saved[n])]
        differ = sorted({*saved, *dict(sent)} - set(equal))
        return {"differ": differ, "same": told == PolicyWeights(policy).metadata()}

    with weights.gathered():
        found = world.lead(compare)
    if world.leads:
        (place / f"{case}.json").write_text(json.dumps(found))


def main(place: Path) -> None:
    for case in CASES:
        check(case, place)
