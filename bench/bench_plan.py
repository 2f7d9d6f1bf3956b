"""The planner against reality: predicted shares of phases and peak memory beside measured ones.

    python -m bench.bench_plan [--runs NAME ...] [--rounds 3] [--json PATH]

For each run a worker process (one thread, the Makefile's allocator settings) takes whole optimizer
steps of a random model, rollouts included, and `python -m fastsd.plan --hardware cpu` plans the
same step in a process of its own, just before and just after. Nothing goes from the measurement
into the plan. Seconds are the process's CPU time; a share is of the step. The aim: shares of phases
above 5 % of the step, and peak memory, within 25 % of what is measured. Memory is counted above the
resting process, so that weights and libraries, which are easy, hide no error; the whole process is
beside it.
Needs Linux with glibc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from bench.common import measure
from bench.train_step.fastsd import _config
from bench.train_step.model import save_model
from bench.train_step.problem import CONFIGURATIONS, EOS_ID, PAD_ID, Configuration, Lengths
from bench.train_step.runs import summary
from bench.train_step.worker import Worker, allocator_settings
from fastsd.config import dump_toml
from fastsd.planning.memory import SLACK

SCRIPT = "bench/bench_plan.py"
AIM, SMALLEST_SHARE = 0.25, 0.05
# Phase of the plan -> phase of the worker's meter.
METERED = {
    "rollout prefill": "rollout",
    "rollout decode": "rollout",
    "student forward": "student",
    "teacher forward": "teacher",
    "loss head forward": "head",
    "loss head backward": "head",
    "student backward": "backward",
    "optimizer": "optimizer",
}
# What stands in the resting process already.
RESTING = ("weights", "fp32 masters", "teacher copy")
_SMOLLM2 = CONFIGURATIONS["smollm2"]


@dataclass(frozen=True)
class Run:
    """One model and step. qwen3: Qwen3's layers in place of Llama's."""

    configuration: Configuration
    precision: str
    condition: str
    checkpointing: bool = False
    qwen3: bool = False


def _shape(base: Configuration, name: str, *lengths: int) -> Configuration:
    record = base.to_json() | {"name": name, "lengths": dict(zip(
        ("question", "feedback", "response", "samples"), lengths, strict=True
    ))}  # fmt: skip
    return Configuration.from_json(record)


_TINY = Configuration("qwen3_tiny", 64, 128, 2, 4, 2, 300, Lengths(24, 24, 12, 4))
_WIDE = Configuration("qwen3_wide", 1024, 3072, 2, 16, 8, 32000, Lengths(96, 96, 48, 4))
RUNS = {
    "llama14m": Run(CONFIGURATIONS["llama14m"], "bf16", "reference"),
    "smollm2": Run(_shape(_SMOLLM2, "smollm2_few", 96, 64, 32, 4), "fp32", "critique"),
    "qwen3_wide": Run(_WIDE, "fp32", "reference", qwen3=True),
    "llama14m_fp32": Run(CONFIGURATIONS["llama14m"], "fp32", "reference", checkpointing=True),
    "smollm2_grpo": Run(_shape(_SMOLLM2, "smollm2_few", 96, 64, 32, 4), "bf16", "grpo"),
    "qwen3_wide_bf16": Run(_WIDE, "bf16", "critique", checkpointing=True, qwen3=True),
    "tiny": Run(_TINY, "fp32", "reference", qwen3=True),
}
DEFAULT_RUNS = ("llama14m", "smollm2", "qwen3_wide")


def save(folder: Path, run: Run) -> None:
    """Writes the run's model with a tokenizer of one token a word."""
    c = run.configuration
    save_model(folder, c)
    if not run.qwen3:
        return
    logging.disable_progress_bar()
    config = Qwen3Config(
        vocab_size=c.vocabulary, hidden_size=c.hidden, intermediate_size=c.ffn,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        head_dim=128, max_position_embeddings=8192, tie_word_embeddings=False,
        pad_token_id=PAD_ID, eos_token_id=EOS_ID, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def settings(folder: Path, run: Run) -> dict[str, Any]:
    return {
        "engine": "fastsd",
        "folder": str(folder),
        "configuration": run.configuration.to_json(),
        "threads": 1,
        "precision": run.precision,
        "condition": run.condition,
        "checkpointing": run.checkpointing,
        "shared": True,
    }


def measured(folder: Path, run: Run, rounds: int) -> dict[str, Any]:
    """cpu and phases of the median step, peak_bytes over rest_bytes."""
    with Worker(settings(folder, run), folder / "worker.log") as worker:
        rest = worker.loaded()["rest_bytes"]
        answers = [
            worker.ask(do="step", index=index, sampled=index > 0) for index in range(rounds + 2)
        ]
    found = summary(answers[2:])
    return found | {"rest_bytes": rest, "peak_bytes": max(a["peak_bytes"] for a in answers)}


def planned(folder: Path, run: Run) -> dict[str, Any]:
    """What `python -m fastsd.plan --json` says, in a process with the worker's environment."""
    config = _config(settings(folder, run), run.configuration, folder)
    if run.condition == "critique":  # feedback for each response, without opening a critic
        config = config.model_copy(update={"condition": "sibling"})
    (folder / "plan.toml").write_text(dump_toml(config))
    at = run.configuration.lengths
    lengths = {"question": at.question, "response": at.response}
    if run.condition != "grpo":
        lengths["feedback"] = at.feedback
    flags = [word for name, value in lengths.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "fastsd.plan", str(folder / "plan.toml"), "--hardware", "cpu"]
    environment = os.environ | allocator_settings() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags, "--json"], cwd=measure.ROOT, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"fastsd.plan ended with {done.returncode}")
    [plan] = json.loads(done.stdout)["plans"]
    return plan


def compare(run: Run, plans: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[dict]:
    """Rows of quantity, planned, measured, error; shares in the step's phases, memory in bytes."""
    seconds = {phase: 0.0 for phase in found["phases"]}
    for plan in plans:
        for work in plan["phases"]:
            phase = METERED[work["phase"]]
            seconds[phase] = seconds.get(phase, 0.0) + sum(work["seconds"]) / 2 / len(plans)
    spent = {phase: cpu for phase, (cpu, _) in found["phases"].items()}
    total, step = sum(seconds.values()), sum(spent.values())
    rows = [
        _row(f"share {phase}", seconds[phase] / total, spent[phase] / step,
             judged=spent[phase] / step > SMALLEST_SHARE)
        for phase in sorted(spent, key=lambda phase: -spent[phase])
    ]  # fmt: skip
    rows.append(_row("step seconds", total, step, judged=False))
    memory = plans[0]["memory_bytes"]
    resident = sum(v for name, v in memory["resident"].items() if name not in RESTING)
    on_top = (resident + sum(memory[memory["moment"]].values())) * (1 + SLACK)
    rows.append(_row("peak memory over rest", on_top, found["peak_bytes"], judged=True))
    whole = found["peak_bytes"] + found["rest_bytes"]
    rows.append(_row("peak memory of the process", memory["peak"], whole, judged=True))
    return rows


def _row(quantity: str, plan: float, found: float, judged: bool) -> dict[str, Any]:
    error = plan / found - 1
    within = abs(error) <= AIM if judged else None
    return {"quantity": quantity, "planned": plan, "measured": found, "error": error,
            "within": within}  # fmt: skip


def line(name: str, row: dict[str, Any]) -> str:
    def show(value: float) -> str:
        if row["quantity"].startswith("share"):
            return f"{value:.1%}"
        return f"{value:.2f}" if "seconds" in row["quantity"] else f"{value / 2**20:,.0f} MiB"

    verdict = {True: "yes", False: "**no**", None: ""}[row["within"]]
    cells = [name, row["quantity"], show(row["planned"]), show(row["measured"])]
    return "| " + " | ".join([*cells, f"{row['error']:+.0%}", verdict]) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(DEFAULT_RUNS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    print("| run | quantity | planned | measured | error | within 25 % |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name in arguments.runs:
        run = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            save(Path(folder), run)
            before = planned(Path(folder), run)
            found = measured(Path(folder), run, arguments.rounds)
            after = planned(Path(folder), run)
        for row in compare(run, (before, after), found):
            print(line(name, row), flush=True)
            rows.append({"run": name, "precision": run.precision, "condition": run.condition,
                         "checkpointing": run.checkpointing, **row})  # fmt: skip
    worst = max((abs(row["error"]) for row in rows if row["within"] is not None), default=0.0)
    missed = sum(row["within"] is False for row in rows)
    print(f"judged rows beyond {AIM:.0%}: {missed}; largest error {worst:.0%}")
    words = sys.argv[1:] if argv is None else list(argv)
    device = torch.device("cpu")
    notes = {"aim": AIM, "threads": 1, "median_of": arguments.rounds}
    measure.write(measure.record(SCRIPT, device, rows, words, **notes), arguments.json)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
