"""One rank of test_agreement.py, which stands for a node.

Each rank works in FOLDER/node-RANK, so that the same relative path names its own model, data and
run folder. What each case raised goes to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import transformers
from small_runs import small_config

from fastsd.errors import FastsdError
from fastsd.runtime import agreement
from fastsd.runtime.agreement import refuse_other_start
from fastsd.runtime.world import ALONE, open_world
from fastsd.train import train
from fastsd.training.recorder import Recorder
from fastsd.training.session import Session

world = ALONE
ROWS = {"task": None, "train": "rows.jsonl", "eval": "rows.jsonl"}


def told(work) -> str:
    try:
        work()
        return ""
    except FastsdError as error:
        return str(error)


def session(config, name: str = "never-written") -> Session:
    return Session(config, Path(name))


def other_settings() -> None:
    seeds = 2 if world.rank else 1
    session(small_config("grpo", optim={"lr": 1e-3 + 1e-3 * world.rank}, seeds=seeds))


def other_sections() -> None:
    adapters = {"model": {"lora": {"r": 4, "alpha": 8}}} if world.rank else {}
    refuse_other_start(world, small_config("grpo", **adapters).model_dump(mode="json"))


def other_packages() -> None:
    version, transformers.__version__ = transformers.__version__, f"5.{world.rank}"
    try:
        session(small_config("grpo"))
    finally:
        transformers.__version__ = version


def other_weights() -> None:
    session(small_config("grpo", model={"name": "model"}))


def other_questions() -> None:
    session(small_config("grpo", data=ROWS, reward={"function": "exact"}))


def own_run_folders(resume: str) -> None:
    config = small_config("grpo", optim={"steps": 1}, resume=resume)
    train(config, Path("run"), Recorder("run"))


def main(folder: Path) -> None:
    global world
    world = open_world(60.0)
    os.chdir(folder / f"node-{world.rank}")
    cases = (other_settings, other_sections, other_packages, other_weights, other_questions)
    answers = {case.__name__: told(case) for case in cases}
    agreement.SEEN_WITHIN_S = 0.5
    answers["fresh"] = told(lambda: own_run_folders("never"))
    os.chdir(folder / "node-0")
    answers["shared"] = told(lambda: own_run_folders("never"))
    os.chdir(folder / f"node-{world.rank}")
    answers["resumed"] = told(lambda: own_run_folders("auto"))
    (folder / f"{world.rank}.json").write_text(json.dumps(answers))
