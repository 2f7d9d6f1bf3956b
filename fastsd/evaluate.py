"""How good is a checkpoint: sample, score, tabulate.

    python -m fastsd.evaluate CHECKPOINT [CONFIG.toml ...] [--eval.questions N ...]

prints Avg@k, pass@k and maj@k with 95 % intervals for any checkpoint folder, and as its last line
one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd.evaluation.results import EvalResult, evaluate
from fastsd.evaluation.scores import METRICS, EvaluationError

if TYPE_CHECKING:
    from fastsd.config import Config


def evaluate_checkpoint(config: Config) -> EvalResult:
    """`evaluate` on the held-out questions of `config`, with the model that it names."""
    from fastsd.evaluation.solver import Solver, refuse_damaged

    refuse_damaged(config)
    return evaluate(Solver(config, Path()), config.eval)


def print_result(checkpoint: str, result: EvalResult, seconds: float) -> None:
    """A small table, then one JSON object on the last line; shares in percent in both."""
    k = result.samples
    names = dict(zip(METRICS, (f"Avg@{k}", f"pass@{k}", f"maj@{k}"), strict=True))
    share = {metric: round(100 * getattr(result, metric), 2) for metric in METRICS}
    ci95 = {m: [round(100 * end, 2) for end in result.intervals[m]] for m in METRICS}
    print(f"{checkpoint}: {result.questions} held-out questions x {k} samples, 95 % intervals")
    for metric, name in names.items():
        low, high = ci95[metric]
        print(f"  {name:8} {share[metric]:6.1f} %   ({low:.1f} to {high:.1f})")
    print(f"  length   {result.mean_length:6.1f} tokens, {result.truncated_share:.1%} truncated")
    if result.unscored:
        print(f"  {result.unscored} samples were not scored and are left out")
    record = {
        **{name.lower().replace("@", "_at_"): share[metric] for metric, name in names.items()},
        "ci95": {name.lower().replace("@", "_at_"): ci95[metric] for metric, name in names.items()},
        "questions": result.questions,
        "samples": k,
        "unscored": result.unscored,
        "mean_length": round(result.mean_length, 2),
        "truncated_share": round(result.truncated_share, 4),
        "seconds": round(seconds, 1),
        "checkpoint": checkpoint,
    }
    print(json.dumps(record), flush=True)


USAGE = """usage: python -m fastsd.evaluate CHECKPOINT [CONFIG.toml ...] [--section.key VALUE ...]

Avg@k, pass@k and maj@k with 95 % intervals on held-out questions. CHECKPOINT is a folder with a
Hugging Face model, a model's name, or chain_sum, the shipped base. Without a CONFIG.toml the run's
own config.resolved.toml is used, and the embedded experiment's settings for the shipped base.
Often wanted: --eval.questions N, --eval.samples K, --eval.seed N, --eval.temperature T; all
settings are listed by python -m fastsd.train --help."""


def main(argv: Sequence[str] | None = None) -> int:
    from fastsd.runtime.program import run_main

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        return 0 if words else 2

    def run() -> None:
        if words[0].startswith("-"):
            raise EvaluationError(f"name a checkpoint before the flags; found {words[0]!r} first")
        from fastsd.evaluation.solver import checkpoint_config

        start = time.perf_counter()
        result = evaluate_checkpoint(checkpoint_config(words[0], words[1:]))
        print_result(words[0], result, time.perf_counter() - start)

    return run_main(run)


if __name__ == "__main__":
    sys.exit(main())
