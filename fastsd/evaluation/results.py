"""One evaluation: sample, score, tabulate; and many: pooled over seeds, compared by question.

The statistics are in `scores.py`; an `EvalResult` keeps the whole table of right and wrong.

Axes: Q questions, K samples per question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsd.evaluation.scores import (
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
    from fastsd.config.sections import EvalConfig
    from fastsd.evaluation.solver import Solver


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


def evaluate(solver: Solver, config: EvalConfig) -> EvalResult:
    """The solver's first config.questions held-out questions, sampled, scored and tabulated."""
    scored = scored_samples(solver, solver.eval_prompts(config.questions), config)
    return tabulate(*zip(*scored, strict=True), samples=config.samples)


def scored_samples(
    solver: Solver, prompts: list[Prompt], config: EvalConfig
) -> list[tuple[Rollout, float | None, str | None]]:
    """Sample `config.samples` responses to each prompt and score them: with reward, and the answer
    that votes in maj@k.

    The sampling key is `config.seed` alone, so every condition and checkpoint meets the same random
    numbers.
    """
    from fastsd.rewards.functions import score_rollouts

    rollouts = solver.sampler.sample(
        prompts, config.samples, key=(config.seed,), temperature=config.temperature
    )
    rewards = score_rollouts(solver.reward, rollouts)
    return list(zip(rollouts, rewards, (solver.answer_of(r.text) for r in rollouts), strict=True))
