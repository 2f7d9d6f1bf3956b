"""One rank of test_vllm_ranks.py."""

import json
from pathlib import Path

from fastsd.config import Config
from fastsd.errors import FastsdError
from fastsd.runtime.world import open_world
from fastsd.train import train
from fastsd.training.recorder import Recorder


def main(config: Config, run_dir: Path) -> None:
    world = open_world(60.0)
    try:
        train(config, run_dir, Recorder("run"))
    except FastsdError as error:
        told = json.dumps({"kind": type(error).__name__, "text": str(error)})
        (run_dir / f"error-{world.rank}.json").write_text(told)
