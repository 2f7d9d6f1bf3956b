"""One rank of test_dry_run.py.

Dry-runs each of CASES; what this rank printed and how many tokens it trained on in each of them go
to FOLDER/RANK.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

from fastsd.config import load_config
from fastsd.train import update
from fastsd.training.dry_run import dry_run
from fastsd.training.session import Session

LORA = ("--model.lora.r", "4", "--model.lora.target-modules", "q_proj", "v_proj")
CASES = {
    "grpo": ("--condition", "grpo"),
    "reference": ("--condition", "reference", "--teacher.kind", "live"),
    "critique": ("--condition", "critique", "--teacher.kind", "ema"),
    "lora": ("--condition", "critique", "--teacher.kind", "adapter_off", *LORA),
}


def main(folder: Path) -> None:
    told: dict[str, dict] = {}
    batches_of = Session.micro_batches

    def noted(session, samples):
        batches = batches_of(session, samples)
        mine = [s for batch in batches for s in batch.samples if not s.dropped]
        told[name]["tokens"] = sum(len(s.rollout.response_ids) for s in mine)
        told[name]["batches"] = len(batches)
        return batches

    Session.micro_batches = noted
    for name, flags in CASES.items():
        told[name], text = {}, io.StringIO()
        with contextlib.redirect_stdout(text):
            dry_run(load_config(list(flags)), update)
        told[name]["text"] = text.getvalue()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
