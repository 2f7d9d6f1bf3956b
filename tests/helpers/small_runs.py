"""Small real runs for tests: the embedded task with a fraction of its budget."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from fastsd.checkpoint import checkpoints
from fastsd.config import Config
from fastsd.config.load import PRESET
from fastsd.config.schema import deep_merge
from fastsd.train import train
from fastsd.training.recorder import Recorder

SMALL = {
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 4},
    "optim": {"steps": 6},
    "eval": {"every": 0, "questions": 2, "samples": 2},
    "checkpoint": {"every": 1, "keep": 50},
    "seeds": 1,
    "run": "given-by-the-test",
    "per_condition": {},
}
LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def small_config(condition: str, **overrides) -> Config:
    """The embedded preset, cut down, with `overrides` merged in."""
    tree = deep_merge(tomllib.loads(PRESET.read_text()), SMALL)
    return Config(**deep_merge(tree, {"condition": condition, **overrides}))


def run_small(config: Config, run_dir: Path) -> Path:
    train(config, run_dir, Recorder(run_dir.name))
    return run_dir


def final_state(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every file of the newest checkpoint, from its manifest."""
    _, newest = checkpoints(run_dir)[0]
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    return {entry["name"]: entry["sha256"] for entry in manifest["files"]}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]
