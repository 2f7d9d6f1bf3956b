"""One rank of test_vllm_ranks.py: torchrun vllm_ranks_worker.py CONFIG.json RUN_FOLDER."""

import json
import sys
from pathlib import Path

import torch

from fastsd.config import Config
from fastsd.recorder import Recorder
from fastsd.train import train
from fastsd.types import FastsdError
from fastsd.world import left_in_order, open_world

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_dir = Path(sys.argv[2])
    with left_in_order():
        world = open_world(60.0)
        try:
            train(Config(**json.loads(Path(sys.argv[1]).read_text())), run_dir, Recorder("run"))
        except FastsdError as error:
            told = json.dumps({"kind": type(error).__name__, "text": str(error)})
            (run_dir / f"error-{world.rank}.json").write_text(told)
