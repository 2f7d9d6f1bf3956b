"""Statistics against hand-computed values, enumeration and simulation."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastsd.config.sections import EvalConfig
from fastsd.evaluate import main
from fastsd.evaluation.results import (
    EvalResult,
    evaluate,
    paired_difference,
    pooled_interval,
    tabulate,
)
from fastsd.evaluation.scores import (
    EvaluationError,
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    majority_by_question,
    pass_at_k,
    pass_by_question,
    pool_seeds,
)
from fastsd.evaluation.solver import checkpoint_config
from fastsd.types import Prompt, Rollout


def rollouts_of(correct_QK, lengths=2, truncated=False):
    prompts = [Prompt(f"q{i}", ({"role": "user", "content": "?"},)) for i in range(len(correct_QK))]
    return [
        Rollout(prompts[q], k, (0,) * lengths, (0.0,) * lengths, "x", truncated)
        for q, row in enumerate(correct_QK)
        for k in range(len(row))
    ]


def result_of(correct_QK) -> EvalResult:
    rewards = [None if c is None else float(c) for row in correct_QK for c in row]
    answers = ["right" if c else "wrong" for row in correct_QK for c in row]
    return tabulate(rollouts_of(correct_QK), rewards, answers, len(correct_QK[0]))


def test_avg_at_k_counts_scored_samples_only():
    assert avg_at_k([[1, 0, 0, 1], [1, 1, 1, 1]]) == 0.75
    assert avg_at_k([[1, None, 0, None], [None] * 4, [1, 1, 1, None]]) == 0.75


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    row = [1, 0, 0, 1, 0]
    subsets = list(itertools.combinations(row, k))
    assert pass_at_k([row], k) == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-15)


def test_pass_at_k_defaults_to_any_of_all_and_survives_missing_scores():
    assert pass_by_question([[0, 0], [0, 1], [None, 1], [None, 0]]).tolist() == [0, 1, 1, 0]
    assert np.isnan(pass_by_question([[None, None]])).all()
    with pytest.raises(EvaluationError, match="1 <= k <= 2"):
        pass_at_k([[0, 1]], 3)


def test_majority_votes_by_answer():
    answers = [["7", "7", "3"], ["3", "3", "7"], [None, None, "7"], [None, None, None]]
    correct = [[1, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert majority_by_question(answers, correct).tolist() == [1, 0, 1, 0]
    assert maj_at_k(answers, correct) == 0.5


def test_majority_ties_are_the_mean_in_any_order():
    answers, correct = ["7", "3", "7", "3", "5"], [1, 0, 1, 0, 0]
    for order in itertools.permutations(range(5)):
        row = [[answers[i] for i in order]], [[correct[i] for i in order]]
        assert maj_at_k(*row) == 0.5


def test_majority_leaves_out_what_was_not_scored():
    assert maj_at_k([["3", "3", "7"]], [[None, None, 1]]) == 1.0
    assert maj_at_k([["", "", "7"]], [[0, 0, 1]]) == 1.0
    assert np.isnan(majority_by_question([["3"]], [[None]])).all()


@pytest.mark.parametrize("table", [[], [[]], [[1, 0], [1]], [[0.5, 1]]])
def test_tables_that_are_not_tables_are_refused(table):
    with pytest.raises(EvaluationError, match="correct_QK"):
        avg_at_k(table)


def test_everything_unscored_is_an_error_not_a_number():
    with pytest.raises(EvaluationError, match="scored"):
        avg_at_k([[None, None]])


def test_interval_matches_the_normal_one_and_is_reproducible():
    values_Q = np.random.default_rng(3).random(400)
    mean, low, high = bootstrap_interval(values_Q)
    # percentile bootstrap of 400 uniform values; 4,000 resamples put the quantiles within 3 % of it
    half = 1.96 * values_Q.std() / np.sqrt(400)
    assert mean == pytest.approx(values_Q.mean(), abs=1e-15)
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    assert bootstrap_interval(values_Q) == (mean, low, high)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials, truth, hits = 300, 0.3, 0
    for _ in range(trials):
        chance_Q = rng.beta(3, 7, 100)
        values_Q = rng.binomial(12, chance_Q) / 12
        _, low, high = bootstrap_interval(values_Q, resamples=2000)
        hits += low <= truth <= high
    # 95 % of 300 is 285, binomial standard deviation 3.8; the percentile method is ~1 point short
    assert hits >= 285 - 3 - 3 * 3.8


def test_interval_resamples_questions_not_samples():
    all_or_nothing = result_of([[1] * 12] * 10 + [[0] * 12] * 10)
    spread = result_of([[1, 0] * 6] * 20)
    assert all_or_nothing.avg_at_k == spread.avg_at_k == 0.5
    assert spread.intervals["avg_at_k"] == (0.5, 0.5)
    low, high = all_or_nothing.intervals["avg_at_k"]
    assert high - low > 0.35


def test_seeds_are_averaged_within_a_question():
    pooled_Q = pool_seeds([np.array([1.0, 0.0, np.nan]), np.array([0.0, 0.0, np.nan])])
    assert pooled_Q[:2].tolist() == [0.5, 0.0] and np.isnan(pooled_Q[2])
    first, second = result_of([[1, 1], [0, 0]]), result_of([[0, 0], [1, 1]])
    assert pooled_interval([first, second]) == (0.5, 0.5, 0.5)


def test_paired_difference_is_narrower_than_the_two_intervals():
    rng = np.random.default_rng(1)
    hard_Q = rng.random(60)
    low = result_of([(rng.random(12) < h * 0.8).astype(int).tolist() for h in hard_Q])
    high = result_of([(rng.random(12) < h * 0.8 + 0.1).astype(int).tolist() for h in hard_Q])
    mean, start, end = paired_difference([high], [low])
    assert mean == pytest.approx(high.avg_at_k - low.avg_at_k, abs=1e-12)
    widths = [r.intervals["avg_at_k"][1] - r.intervals["avg_at_k"][0] for r in (low, high)]
    assert end - start < 0.7 * max(widths)
    assert start > 0


def test_results_on_other_questions_are_not_compared():
    with pytest.raises(EvaluationError, match="same questions"):
        paired_difference([result_of([[1], [0]])], [result_of([[1], [0], [1]])])
    with pytest.raises(EvaluationError, match="no evaluation"):
        pooled_interval([])


def test_tabulate_fills_every_field_and_survives_json():
    correct_QK = [[1, 0, None], [0, 0, 0]]
    rewards = [1.0, 0.9, None, 0.0, 0.0, 0.0]
    answers = ["4", "5", "4", None, "1", "1"]
    result = tabulate(rollouts_of(correct_QK, 4, True), rewards, answers, 3)
    assert result.correct_QK == correct_QK and result.unscored == 1
    assert (result.avg_at_k, result.pass_at_k, result.maj_at_k) == (0.25, 0.5, 0.25)
    assert (result.questions, result.samples, result.mean_length) == (2, 3, 4.0)
    assert result.truncated_share == 1.0 and result.question_ids == ["q0", "q1"]
    record = json.loads(json.dumps({"step": 4, **result.to_json()}, allow_nan=False))
    assert EvalResult.from_json(record) == result
    del record["maj_Q"]
    with pytest.raises(EvaluationError, match="maj_Q"):
        EvalResult.from_json(record)


def test_tabulate_refuses_rollouts_out_of_order():
    rollouts = rollouts_of([[1, 0], [1, 0]])
    with pytest.raises(EvaluationError, match="grouped"):
        tabulate(rollouts[::2] + rollouts[1::2], [0.0] * 4, ["1"] * 4, 2)
    with pytest.raises(EvaluationError, match="whole groups"):
        tabulate(rollouts[:3], [0.0] * 3, ["1"] * 3, 2)
    with pytest.raises(EvaluationError, match="twice"):
        tabulate(rollouts[:2] * 2, [0.0] * 4, ["1"] * 4, 2)


class ScriptedSampler:
    """Answers "4" or "5" by turns and remembers how it was called."""

    def sample(self, prompts, samples, key, temperature=None):
        self.call = (samples, key, temperature)
        texts = [(prompt, k, "45"[k % 2]) for prompt in prompts for k in range(samples)]
        return [Rollout(p, k, (1, 2), (0.0, 0.0), text, False) for p, k, text in texts]


def test_evaluate_scores_what_the_sampler_answers():
    def reward(prompts, completions, answer, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [float(t == a) for t, a in zip(texts, answer, strict=True)]

    question = ({"role": "user", "content": "2+2"},)
    prompts = [Prompt("a", question, answer="4"), Prompt("b", question, answer="6")]
    sampler = ScriptedSampler()
    solver = SimpleNamespace(
        sampler=sampler, reward=reward, eval_prompts=lambda count: prompts[:count], answer_of=str
    )
    config = EvalConfig(questions=2, samples=3, temperature=0.7, seed=5)
    result = evaluate(solver, config)
    assert sampler.call == (3, (5,), 0.7)
    assert result.correct_QK == [[1, 0, 1], [0, 0, 0]]
    assert (result.maj_at_k, result.pass_at_k) == (0.5, 0.5)


def test_a_checkpoint_is_evaluated_with_its_runs_settings(tmp_path):
    folder = tmp_path / "run" / "checkpoint-10"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "config.resolved.toml").write_text(
        '[model]\nname = "old"\nlora = {r = 2}\n'
        '[data]\ntask = "word_problems"\n[eval]\nsamples = 5\n'
    )
    config = checkpoint_config(str(folder), ["--eval.questions", "9"])
    assert (config.model.name, config.model.lora) == (str(folder), None)
    assert config.data.task == "word_problems"
    assert (config.eval.samples, config.eval.questions) == (5, 9)
    other = tmp_path / "other.toml"
    other.write_text('[data]\ntask = "chain_sum"\n')
    assert checkpoint_config(str(folder), [str(other)]).eval.samples == EvalConfig().samples


def test_a_checkpoint_without_settings_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "a" / "b" / "checkpoint-1")]) == 2
    assert "data.task" in capsys.readouterr().err
    assert main(["--eval.questions", "4"]) == 2
    assert "before the flags" in capsys.readouterr().err


def test_the_shipped_base_is_evaluated_by_name(capsys):
    flags = ["--eval.questions", "12", "--eval.samples", "4"]
    assert main(["chain_sum", *flags]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert table[0].startswith("chain_sum: 12 held-out questions x 4 samples")
    assert {"avg_at_4", "pass_at_4", "maj_at_4", "ci95", "seconds"} <= set(record)
    # the base is around 30 %; 12 questions of 4 samples leave a wide margin
    assert 0 < record["avg_at_4"] < 75
    low, high = record["ci95"]["avg_at_4"]
    assert low <= record["avg_at_4"] <= high
    assert main(["chain_sum", *flags]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {**again, "seconds": 0} == {**record, "seconds": 0}


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys; from fastsd.evaluate import main; main(['--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m fastsd.evaluate")
