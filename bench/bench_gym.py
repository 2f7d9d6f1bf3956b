"""Every data set of reasoning-gym as a task: does it work, and are its own answers right?

    python -m bench.bench_gym [--questions 3] [--datasets NAME ...] [--json PATH]

For each data set the first training questions are asked through `fastsd.tasks.gym`, as in a run,
and each question's own answer is given back as a response: it must score 1.0. Then two processes
with different hash seeds make the same entries straight from the package, and the data sets are
named whose questions, or whose answers alone, are others: what the workers' fixed hash seed is for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from bench.common import measure
from fastsd.tasks import TaskError, gym

SCRIPT = "bench/bench_gym.py"
ENTRIES = 20
# Prints for each data set the digests of its first questions and of their answers.
MADE = f"""
import hashlib, json, random, sys, reasoning_gym
out, sys.stdout = sys.stdout, sys.stderr  # some data sets print
for name in sys.argv[1:]:
    random.seed(0)
    entries = reasoning_gym.create_dataset(name, seed=1, size={ENTRIES})
    rows = [entries[i] for i in range({ENTRIES})]
    texts = [json.dumps([str(row[key]) for row in rows]) for key in ("question", "answer")]
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    print(json.dumps([name, *digests]), file=out)
"""


def names() -> list[str]:
    """All data sets of the package, without importing it here."""
    [line] = gym.workers().map([{"do": "describe", "dataset": ""}], 120.0)
    if line is None:
        raise RuntimeError("reasoning-gym's worker did not answer")
    return json.loads(line)["datasets"]


def tried(name: str, questions: int) -> dict:
    """Whether the data set can be a task, and the rewards of its own answers."""
    start = time.perf_counter()
    try:
        task = gym.ReasoningGym(name)
        prompts = [task.prompt("train", index) for index in range(questions)]
    except TaskError as error:
        return {"dataset": name, "why_not": str(error)}
    known = [prompt for prompt in prompts if prompt.answer is not None]
    columns = {key: [p.columns[key] for p in known] for key in ("dataset_seed", "dataset_index")}
    said = [[{"role": "assistant", "content": f"<answer>{p.answer}</answer>"}] for p in known]
    rewards = task.reward_within(5.0)([p.question for p in known], said, **columns)
    return {"dataset": name, "asked": len(prompts), "answers": len(known), "right": sum(rewards),
            "seconds": time.perf_counter() - start}  # fmt: skip


def depends_on_hashes(datasets: Sequence[str]) -> dict[str, list[str]]:
    """Data sets with other questions, and with other answers to the same ones, by hash seed."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", MADE, *datasets], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    printed = [child.communicate()[0].splitlines() for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError("reasoning-gym could not make its entries")
    pairs = [[json.loads(line) for line in pair] for pair in zip(*printed, strict=True)]
    return {
        "questions": [one[0] for one, other in pairs if one[1] != other[1]],
        "answers": [one[0] for one, other in pairs if one[1] == other[1] and one[2] != other[2]],
    }


def line(row: dict) -> str:
    if "why_not" in row:
        return f"| {row['dataset']} | {row['why_not']} | | |"
    answers = f"{row['right']:.0f} of {row['answers']} right"
    return f"| {row['dataset']} | {row['asked']} asked | {answers} | {row['seconds']:.1f} s |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--datasets", nargs="*")
    parser.add_argument("--skip-hash-seeds", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.datasets or names():
        rows.append(tried(name, arguments.questions))
        print(line(rows[-1]), flush=True)
    working = [row["dataset"] for row in rows if "why_not" not in row]
    wrong = [row["dataset"] for row in rows if "right" in row and row["right"] != row["answers"]]
    facts: dict = {"package": metadata.version("reasoning-gym"), "working": len(working)}
    if not arguments.skip_hash_seeds:
        facts["other_by_hash_seed"] = depends_on_hashes(working)
    print(f"{len(working)} of {len(rows)} work; own answers not right: {wrong or 'none'}; "
          f"other by hash seed: {facts.get('other_by_hash_seed', 'not tried')}")  # fmt: skip
    words = sys.argv[1:] if argv is None else list(argv)
    found = measure.record(SCRIPT, torch.device("cpu"), rows, words, **facts)
    measure.write(found, arguments.json)
    gym.workers().close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
