"""Avg@k, pass@k, maj@k and their intervals: plain numpy on a table of right, wrong and not scored.

What the intervals mean, everywhere in fastsd:

* The unit of resampling is the QUESTION (its K samples stay together): samples of one question are
  far from independent, questions are what we would draw anew.
* Several training seeds are averaged within each question before resampling. Such an interval is
  about the questions; the spread between seeds is not in it and is printed beside it.
* Two conditions are compared on the same questions: the interval is that of the mean difference per
  question, which is much narrower than two intervals side by side.

A sample whose reward is None was not scored. It is left out of its question's n; a question without
any scored sample is left out of the means.

Axes: Q questions, K samples per question, S training seeds, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from fastsd.errors import FastsdError

METRICS = ("avg_at_k", "pass_at_k", "maj_at_k")
RESAMPLES = 4000
QUANTILES = (0.025, 0.975)

Table = Sequence[Sequence[float | None]]
Interval = tuple[float, float, float]


class EvaluationError(FastsdError):
    """An evaluation whose inputs do not fit together, or that scored nothing."""


def _matrix(correct_QK: Table) -> np.ndarray:
    """The table as float64 [Q, K], NaN for None; EvaluationError where ragged or not 0/1."""
    if not len(correct_QK) or len({len(row) for row in correct_QK}) != 1 or not len(correct_QK[0]):
        lengths = sorted({len(row) for row in correct_QK})
        raise EvaluationError(f"correct_QK must be a Q x K table; found row lengths {lengths}")
    matrix_QK = np.array([[np.nan if c is None else c for c in row] for row in correct_QK], float)
    if not np.isin(matrix_QK[~np.isnan(matrix_QK)], (0.0, 1.0)).all():
        raise EvaluationError("correct_QK must hold 0, 1 or None only; rewards are not correctness")
    return matrix_QK


def avg_by_question(correct_QK: Table) -> np.ndarray:
    """Share of scored samples that are right, float64 [Q]; NaN where nothing was scored."""
    matrix_QK = _matrix(correct_QK)
    scored_Q = (~np.isnan(matrix_QK)).sum(axis=1)
    right_Q = np.nansum(matrix_QK, axis=1)
    return np.where(scored_Q > 0, right_Q / np.maximum(scored_Q, 1), np.nan)


def pass_by_question(correct_QK: Table, k: int | None = None) -> np.ndarray:
    """Unbiased chance that one of k samples is right, 1 - C(n-c, k) / C(n, k), float64 [Q].

    n scored samples of which c are right (Chen et al. 2021, arXiv 2107.03374); k defaults to K.
    With n < k (samples that were not scored) all n are used: a lower bound. NaN where n = 0.
    """
    matrix_QK = _matrix(correct_QK)
    most = matrix_QK.shape[1]
    wanted = most if k is None else k
    if not 1 <= wanted <= most:
        raise EvaluationError(f"pass@k needs 1 <= k <= {most} samples; found k = {k}")

    def one(row_K: np.ndarray) -> float:
        n, c = int((~np.isnan(row_K)).sum()), int(np.nansum(row_K))
        drawn = min(wanted, n)
        return 1.0 - math.comb(n - c, drawn) / math.comb(n, drawn) if n else math.nan

    return np.array([one(row_K) for row_K in matrix_QK])


def majority_by_question(
    answers_QK: Sequence[Sequence[str | None]], correct_QK: Table
) -> np.ndarray:
    """Is the most frequent answer right? float64 [Q]; NaN where nothing was scored.

    Votes are equal strings, as extracted; samples without an answer (None, empty) or without a
    score have no vote, and a scored question without votes is wrong. Ties count as the mean over
    the tied answers: what a coin would give on average, whatever the order of the samples.
    """
    matrix_QK = _matrix(correct_QK)
    if [len(row) for row in answers_QK] != [matrix_QK.shape[1]] * matrix_QK.shape[0]:
        raise EvaluationError(f"answers_QK must have the shape of correct_QK, {matrix_QK.shape}")

    def one(answers_K: Sequence[str | None], row_K: np.ndarray) -> float:
        if np.isnan(row_K).all():
            return math.nan
        marks: dict[str, list[float]] = defaultdict(list)
        for answer, mark in zip(answers_K, row_K, strict=True):
            if answer and not np.isnan(mark):
                marks[answer].append(float(mark))
        most = max((len(m) for m in marks.values()), default=0)
        return float(np.mean([np.mean(m) for m in marks.values() if len(m) == most] or [0.0]))

    return np.array([one(a, row_K) for a, row_K in zip(answers_QK, matrix_QK, strict=True)])


def avg_at_k(correct_QK: Table) -> float:
    """Mean over questions of the share of right samples (Avg@k, also mean@k)."""
    return _mean(avg_by_question(correct_QK))


def pass_at_k(correct_QK: Table, k: int | None = None) -> float:
    """Mean over questions of `pass_by_question`."""
    return _mean(pass_by_question(correct_QK, k))


def maj_at_k(answers_QK: Sequence[Sequence[str | None]], correct_QK: Table) -> float:
    """Mean over questions of `majority_by_question`."""
    return _mean(majority_by_question(answers_QK, correct_QK))


def _mean(values_Q: np.ndarray) -> float:
    kept_Q = values_Q[~np.isnan(values_Q)]
    if not kept_Q.size:
        raise EvaluationError("no sample of any question was scored; every reward was None")
    return float(kept_Q.mean())


def bootstrap_interval(
    values_Q: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """(mean, low, high): the 95 % percentile bootstrap interval of the mean over questions.

    Questions with NaN are left out. The same values always give the same interval.
    """
    mean = _mean(values_Q)
    kept_Q = values_Q[~np.isnan(values_Q)]
    picks_RQ = np.random.default_rng(seed).integers(0, kept_Q.size, (resamples, kept_Q.size))
    low, high = np.quantile(kept_Q[picks_RQ].mean(axis=1), QUANTILES)
    return mean, float(low), float(high)


def pool_seeds(values_SQ: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the seeds that scored each question, float64 [Q]; NaN where none did."""
    stacked_SQ = np.stack([np.asarray(values_Q, float) for values_Q in values_SQ])
    scored_Q = (~np.isnan(stacked_SQ)).sum(axis=0)
    return np.where(scored_Q > 0, np.nansum(stacked_SQ, axis=0) / np.maximum(scored_Q, 1), np.nan)
