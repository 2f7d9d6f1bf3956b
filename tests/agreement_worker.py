"""One rank of test_agreement.py, which stands for a node: torchrun agreement_worker.py FOLDER.

Each rank works in FOLDER/node-RANK, so that the same relative path names its own model, data and
run folder. What each case raised goes to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from runs import small_config

from fastsd import agreement
from fastsd.agreement import refuse_other_start
from fastsd.recorder import Recorder
from fastsd.session import Session
from fastsd.train import train
from fastsd.types import FastsdError
from fastsd.world import left_in_order, open_world

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
    refuse_other_start(world, small_config("grpo", **adapters))


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    with left_in_order():
        world = open_world(60.0)
        main(Path(sys.argv[1]))
