"""The settings of a run on two ranks, and what it leaves."""

from __future__ import annotations

from pathlib import Path

from small_runs import small_config

from fastsd.checkpoint import checkpoints

STEPS = 10


def settings(condition: str, **changes) -> dict:
    """Ten updates, with a checkpoint after the fifth."""
    fixed = {"optim": {"steps": STEPS, **changes.pop("optim", {})}}
    return small_config(
        condition, **fixed, checkpoint={"every": 5, "keep": 9}, **changes
    ).model_dump(mode="json")


def newest(run_dir: Path) -> Path:
    return checkpoints(run_dir)[0][1]
