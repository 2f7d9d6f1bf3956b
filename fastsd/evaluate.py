"""How good is a checkpoint: sample, score, tabulate.

    python -m fastsd.evaluate CHECKPOINT [CONFIG.toml ...] [--eval.questions N ...]

prints Avg@k, pass@k and maj@k with 95 % intervals for any checkpoint folder, and as its last line
one JSON object. The statistics are in `fastsd.scores`; an `EvalResult` keeps the whole table of
right and wrong, so that results can be pooled over seeds and compared by question later.

Axes: Q questions, K samples per question.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsd.scores import (
    METRICS,
    EvaluationError,
    Interval,
    avg_by_question,
    bootstrap_interval,
    majority_by_question,
    pass_by_question,
    pool_seeds,
)
from fastsd.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastsd.config import Config
    from fastsd.config.sections import EvalConfig


@dataclass(frozen=True)
class EvalResult:
    """One evaluation. Shares are fractions in [0, 1]; `intervals` holds metric -> (low, high).

    correct_QK: 1, 0 or None (not scored); maj_Q: the majority's correctness by question;
    mean_length: tokens per response; truncated_share: responses that never stopped.
    """

    questions: int
    samples: int
    avg_at_k: float
    pass_at_k: float
    maj_at_k: float
    intervals: dict[str, tuple[float, float]]
    mean_length: float
    truncated_share: float
    unscored: int
    question_ids: list[str]
    correct_QK: list[list[int | None]]
    maj_Q: list[float | None]

    def by_question(self, metric: str) -> np.ndarray:
        """float64 [Q] values whose mean is the metric."""
        if metric == "maj_at_k":
            return np.array([np.nan if m is None else m for m in self.maj_Q], float)
        by_question = {"avg_at_k": avg_by_question, "pass_at_k": pass_by_question}
        return by_question[metric](self.correct_QK)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "intervals": {m: list(v) for m, v in self.intervals.items()}}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> EvalResult:
        """Inverse of `to_json`; keys it does not know (such as "step") are ignored."""
        missing = [f.name for f in fields(cls) if f.name not in record]
        if missing:
            raise EvaluationError(f"evaluation record lacks {', '.join(missing)}; evaluate again")
        known = {f.name: record[f.name] for f in fields(cls)}
        known["intervals"] = {m: (v[0], v[1]) for m, v in record["intervals"].items()}
        return cls(**known)


def pooled_interval(results: Sequence[EvalResult], metric: str = "avg_at_k") -> Interval:
    """(mean, low, high) of one condition: seeds averaged within a question, questions resampled."""
    _same_questions(results)
    return bootstrap_interval(pool_seeds([r.by_question(metric) for r in results]))


def paired_difference(
    first: Sequence[EvalResult], second: Sequence[EvalResult], metric: str = "avg_at_k"
) -> Interval:
    """(mean, low, high) of first - second on the same questions, pooled over each one's seeds."""
    _same_questions([*first, *second])
    first_Q = pool_seeds([r.by_question(metric) for r in first])
    second_Q = pool_seeds([r.by_question(metric) for r in second])
    return bootstrap_interval(first_Q - second_Q)


def _same_questions(results: Sequence[EvalResult]) -> None:
    if not results:
        raise EvaluationError("no evaluation result to pool")
    for result in results[1:]:
        if (result.question_ids, result.samples) != (results[0].question_ids, results[0].samples):
            raise EvaluationError(
                "these evaluations were not made on the same questions and number of samples "
                f"({results[0].questions} x {results[0].samples} against {result.questions} x "
                f"{result.samples}): they cannot be pooled or compared by question"
            )


def tabulate(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    answers: Sequence[str | None],
    samples: int,
) -> EvalResult:
    """EvalResult of scored rollouts, grouped by prompt; a sample is right where its reward >= 1."""
    if not rollouts or len(rollouts) % samples or not len(rollouts) == len(rewards) == len(answers):
        raise EvaluationError(
            f"{len(rollouts)} rollouts, {len(rewards)} rewards and {len(answers)} answers do not "
            f"make whole groups of {samples} samples"
        )
    starts = range(0, len(rollouts), samples)
    ids = [rollouts[start].prompt.id for start in starts]
    if [r.prompt.id for r in rollouts] != [i for i in ids for _ in range(samples)]:
        raise EvaluationError("rollouts are not grouped by prompt; the sampler broke its contract")
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise EvaluationError(f"question id {repeated[0]!r} occurs twice; give each its own id")
    right = [None if reward is None else int(reward >= 1.0) for reward in rewards]
    correct_QK = [right[start : start + samples] for start in starts]
    majority_Q = majority_by_question([answers[s : s + samples] for s in starts], correct_QK)
    by_question = (avg_by_question(correct_QK), pass_by_question(correct_QK), majority_Q)
    intervals = {m: bootstrap_interval(v) for m, v in zip(METRICS, by_question, strict=True)}
    return EvalResult(
        questions=len(ids),
        samples=samples,
        **{metric: interval[0] for metric, interval in intervals.items()},
        intervals={metric: interval[1:] for metric, interval in intervals.items()},
        mean_length=float(np.mean([len(r.response_ids) for r in rollouts])),
        truncated_share=float(np.mean([r.truncated for r in rollouts])),
        unscored=right.count(None),
        question_ids=ids,
        correct_QK=correct_QK,
        maj_Q=[None if math.isnan(m) else float(m) for m in majority_Q],
    )


def evaluate(
    sampler: Any,
    reward_fn: Callable[..., list[float | None]],
    prompts: list[Prompt],
    config: EvalConfig,
    answer_of: Callable[[str], str | None],
) -> EvalResult:
    """`scored_samples`, tabulated."""
    scored = scored_samples(sampler, reward_fn, prompts, config, answer_of)
    return tabulate(*zip(*scored, strict=True), samples=config.samples)


def scored_samples(
    sampler: Any,
    reward_fn: Callable[..., list[float | None]],
    prompts: list[Prompt],
    config: EvalConfig,
    answer_of: Callable[[str], str | None],
) -> list[tuple[Rollout, float | None, str | None]]:
    """Sample `config.samples` responses to each prompt and score them: with reward and answer.

    answer_of maps a response's text to the answer that votes in maj@k. The sampling key is
    `config.seed` alone, so every condition and checkpoint meets the same random numbers.
    """
    from fastsd.rewards.functions import score_rollouts

    rollouts = sampler.sample(
        prompts, config.samples, key=(config.seed,), temperature=config.temperature
    )
    rewards = score_rollouts(reward_fn, rollouts)
    return list(zip(rollouts, rewards, (answer_of(r.text) for r in rollouts), strict=True))


def checkpoint_config(checkpoint: str, words: Sequence[str]) -> Config:
    """The configuration that evaluates `checkpoint`; `words` are TOML files and flags.

    Without a file: the config.resolved.toml beside the checkpoint or one folder up, else the
    embedded experiment if the checkpoint is its shipped base. Raises ConfigError where that leaves
    something unset.
    """
    from fastsd.config import load_config
    from fastsd.config.flags import parse_flags
    from fastsd.config.load import PRESET
    from fastsd.model.loading import model_path

    folder = Path(model_path(checkpoint)).resolve()
    files = parse_flags(words).files
    if not files:
        near = (parent / "config.resolved.toml" for parent in list(folder.parents)[:2])
        base = [PRESET] if folder == Path(model_path("chain_sum")).resolve() else []
        files = [str(file) for file in [*filter(Path.exists, near), *base][:1]]
        words = [*files, *words]
    config = load_config([*words, "--model.name", checkpoint]).config
    # A checkpoint holds whole weights: adapters are merged into it, and nothing is trained here.
    plain = {"lora": None, "freeze": [], "gradient_checkpointing": False}
    return config.model_copy(update={"model": config.model.model_copy(update=plain)})


def evaluate_checkpoint(config: Config) -> EvalResult:
    """`evaluate` on the held-out questions of `config`, with the model that it names."""
    import torch

    from fastsd.checkpoint import manifest
    from fastsd.model import load_policy
    from fastsd.model.loading import model_path
    from fastsd.prompts.render import PromptRenderer
    from fastsd.prompts.sources import load_data
    from fastsd.rewards.functions import load_reward
    from fastsd.rollout import Sampler
    from fastsd.runtime import hardware
    from fastsd.session import open_task
    from fastsd.tasks.answers import extract_answer

    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(model_path(config.model.name))
    if (folder / manifest.MANIFEST).exists():
        manifest.verify(folder)
    device = hardware.resolve_device(config.device)
    task = open_task(config)
    _, eval_prompts = load_data(config.data, task, config.seed)
    policy = load_policy(config.model, device, hardware.resolve_dtype(config.model.dtype, device))
    sampler = Sampler(policy, PromptRenderer(policy.tokenizer, config.prompt), config.rollout)
    return evaluate(
        sampler,
        load_reward(config.reward, task),
        eval_prompts(config.eval.questions),
        config.eval,
        task.answer if task else extract_answer,
    )


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
        start = time.perf_counter()
        result = evaluate_checkpoint(checkpoint_config(words[0], words[1:]))
        print_result(words[0], result, time.perf_counter() - start)

    return run_main(run)


if __name__ == "__main__":
    sys.exit(main())
