"""Advantages of a context by the definition (two full rows per rollout), and what is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import small_config
from tiny_models import build_tiny_llama

from fastsd.config import Config
from fastsd.config.sections import ReportConfig
from fastsd.errors import CriticUnavailable
from fastsd.evaluation.localisation import Localisation, localisation
from fastsd.evaluation.measure import (
    NO_ROOM,
    applicable_contexts,
    localise,
    marked_steps,
    measure,
    measure_localisation,
)
from fastsd.evaluation.summary import localisation_rows
from fastsd.evaluation.views import by_rollout, read_views
from fastsd.training.experiment import _measure
from fastsd.training.session import Session
from fastsd.types import Critique, Feedback, Prompt, Rollout, Step


def log_probs(session, prompt_ids, response_ids):
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = session.policy.model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    logits = logits.double() / session.config.rollout.temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response_ids)[:, None])[:, 0]


@pytest.mark.parametrize("condition", ["reference", "critique"])
@torch.no_grad()
def test_advantages_come_in_the_rollouts_order(condition, tmp_path):
    found = []
    for budget in (100_000, 250, 30):
        optim = {"micro_batch_tokens": budget}
        session = Session(small_config(condition, optim=optim), tmp_path)
        tokens = []
        session.policy.decoder.layers[0].register_forward_pre_hook(
            lambda _, args, tokens=tokens: tokens.append(args[0].shape[1])
        )
        samples = session.next_samples()
        tokens.clear()
        rollouts = [sample.rollout for sample in samples]
        found.append([v.advantage for v in measure(session, rollouts, [condition], 0)])
        if budget == 100_000:
            question = sum({s.group: len(s.student_ids) for s in samples}.values())
            response = sum(len(s.rollout.response_ids) - 1 for s in samples)
            assert tokens[0] == question + response
            # The teacher reads all of the question but its end, which feedback follows.
            assert tokens[1] < response + sum(len(s.teacher_ids) - 5 for s in samples)
    for sample, *values in zip(samples, *found, strict=True):
        ids = sample.rollout.response_ids
        teacher, student = (
            log_probs(session, prompt, ids) for prompt in (sample.teacher_ids, sample.student_ids)
        )
        for got in values:
            # fp32 log-probs of a few units, differences of two.
            torch.testing.assert_close(
                torch.tensor(got).double(), teacher - student, rtol=0, atol=5e-5
            )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return Session(small_config("critique"), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def measured(session):
    return measure_localisation(session, ["grpo", "critique"])


README = {
    "reference": [0.163, 0.708, 0.128, 3.331, 86.3, 88.3, 39.3],
    "critique": [0.048, 0.597, 0.200, 3.334, 95.5, 100.0, 21.2],
}
LAST_DIGIT = np.array([1e-3] * 4 + [0.1] * 3)
# Two fp32 log-probs of the same weights and tokens, between instruction sets: at most 9.5e-6.
ROUNDING = 1e-5


def figures(*parts: Localisation) -> np.ndarray:
    """A context's row in the report."""
    whole = {"localisation": {"": sum(parts, Localisation()).to_json()}}
    [(_, *cells)] = localisation_rows(whole)
    return np.array([float(cell.removesuffix(" %")) for cell in cells])


def part_of(view) -> Localisation:
    rollout = SimpleNamespace(text=view.response, reward=view.reward, response_ids=view.spans)
    return localisation([rollout], [view.advantage], [view.steps], [view.spans])


@pytest.mark.parametrize("context", README)
def test_the_embedded_figures_are_those_of_the_readme(measured, context):
    """On any processor: rounding may turn a sampled token, which puts another response in the
    place of one, and it draws the signs, which the last figure counts, of what is rounding."""
    assert list(measured[1]) == list(README)
    views = [view for view in measured[0] if view.context == context and view.taught]
    parts = [part_of(view) for view in views]
    before = list(accumulate(parts, initial=Localisation()))
    after = list(accumulate(parts[::-1], initial=Localisation()))[::-1]
    shown, without = figures(*parts), list(map(figures, before, after[1:]))
    # One taken away and one put in its place: each moves a figure as leaving one out does.
    bound = LAST_DIGIT + 2 * np.abs(without - shown).max(0)
    right = [a for v, part in zip(views, parts, strict=True) if part.correct_responses
             for a in v.advantage]  # fmt: skip
    drawn = sum(abs(a) <= ROUNDING for a in right)
    # A fair sign on either processor: a difference of variance 1/2 each; three deviations.
    bound[-1] += 100 * 3 * (drawn / 2) ** 0.5 / len(right)
    assert (np.abs(shown - README[context]) <= bound).all(), (shown, bound)


def test_views_tell_the_whole_story_of_a_rollout(session, measured):
    views, places = measured
    groups = by_rollout(views)
    assert len(groups) == 64 * 4 and len(views) == 2 * len(groups)
    for group in groups:
        reference, critique = group
        assert (reference.context, critique.context) == ("reference", "critique")
        question, response = critique.question, critique.response
        for name in ("question", "response", "answer", "steps", "spans", "reward"):
            assert getattr(reference, name) == getattr(critique, name)
        assert reference.student_logprob == pytest.approx(critique.student_logprob, abs=1e-5)
        assert [reference.reward] == session.task.reward([question], [response])
        assert reference.steps == tuple(session.task.steps(question, response))
        judged = session.task.critique(question, response, None)
        assert critique.feedback == judged.text
        asked = session.task.prompt("eval", int(reference.prompt_id.rpartition("/")[2]))
        assert reference.feedback == asked.solution
        wrong = [k for k, step in enumerate(critique.steps) if not step.correct]
        assert critique.first_error == (wrong[0] if wrong else None)
        for view in group:
            assert len(view.alternatives) == len(view.spans) == len(view.divergence)
            assert all(
                len(some) == session.config.report.alternatives for some in view.alternatives
            )
            assert view.response == "".join(view.response[a:b] for a, b in view.spans)
    assert places["critique"].wrong_responses == sum(g[0].first_error is not None for g in groups)


class ScriptedCritic:
    """Critiques by the index of the rollout: None is a timeout."""

    name = "scripted"

    def __init__(self, texts):
        self.texts = texts

    def critique(self, rollouts):
        return [Critique(t, None, None if t else "timeout") for t in self.texts[: len(rollouts)]]


def test_invalid_critiques_are_left_out_and_counted(session, monkeypatch):
    rollouts = [sample.rollout for sample in session.next_samples()]
    texts = ["3+3=6;", None, "3+3=6;", *[None] * 9]
    whole = measure(session, rollouts, ["reference"], 0)
    monkeypatch.setitem(vars(session), "critic", ScriptedCritic(texts))
    views = measure(session, rollouts, ["reference", "critique"], 2)
    critiques = [view for view in views if view.context == "critique"]
    for text, view in zip(texts, critiques, strict=True):
        assert view.feedback == text and view.problem == (None if text else "timeout")
        assert view.taught == bool(text) and len(view.student_logprob) == len(view.spans)
        assert len(view.divergence) == len(view.alternatives) == len(view.advantage)
    references = [view for view in views if view.context == "reference"]
    assert [v.advantage for v in references] == [v.advantage for v in whole]
    places = localise(rollouts, views, ["reference", "critique"])
    found = places["critique"]
    assert found.wrong_responses + found.correct_responses + found.unplaced == 12
    assert found.unplaced >= 10 > places["reference"].unplaced


def test_a_dead_critic_is_not_hidden(session, monkeypatch):
    class Dead:
        def critique(self, rollouts):
            raise CriticUnavailable("no answer from http://127.0.0.1:9")

    monkeypatch.setitem(vars(session), "critic", Dead())
    with pytest.raises(CriticUnavailable, match="no answer"):
        measure_localisation(session, ["critique"])


def test_feedback_without_room_was_not_shown(session, monkeypatch):
    monkeypatch.setattr(session.renderer, "teacher", lambda *_: None)
    rollouts = [sample.rollout for sample in session.next_samples()]
    for view in measure(session, rollouts, ["reference"], 1):
        assert (view.feedback, view.problem, view.taught) == (None, NO_ROOM, False)


def test_a_sibling_context_has_only_those_with_a_right_sibling(session):
    rollouts = [sample.rollout for sample in session.next_samples()]
    rollouts = [replace(r, reward=float(i in (1, 4, 5))) for i, r in enumerate(rollouts)]
    views = measure(session, rollouts, ["sibling"], 0)
    assert [v.taught for v in views] == [i not in (1, 8, 9, 10, 11) for i in range(12)]
    assert all(v.problem is None for v in views)


RULES, GYM = SimpleNamespace(), SimpleNamespace(has_rules=False)


@pytest.mark.parametrize(
    ("task", "kind", "solutions", "conditions", "expected"),
    [
        (RULES, "rule", True, ["grpo"], ["reference", "critique"]),
        (RULES, "rule", True, ["grpo", "reference", "critique"], ["reference", "critique"]),
        (RULES, "rule", True, ["sibling"], ["reference", "critique", "sibling"]),
        (RULES, "server", True, ["grpo"], ["reference"]),
        (GYM, "rule", False, ["grpo"], []),
        (None, "rule", False, ["grpo"], []),
        (None, "rule", True, ["grpo"], ["reference"]),
        (None, "server", False, ["grpo"], []),
        (None, "server", False, ["critique"], ["critique"]),
        (None, "replay", True, ["critique"], ["reference", "critique"]),
        (None, "rule", False, ["sibling"], ["sibling"]),
    ],
)
def test_contexts_that_apply(task, kind, solutions, conditions, expected):
    message = ({"role": "user", "content": "?"},)
    prompts = [Prompt("a", message, solution="s"), Prompt("b", message)]
    prompts[1] = replace(prompts[1], solution="s" if solutions else None)
    config = Config(condition="grpo", critic={"kind": kind})
    subject = SimpleNamespace(task=task, config=config)
    assert applicable_contexts(subject, conditions, prompts) == expected


@pytest.mark.parametrize("report", [{"questions": 0}, {"questions": 4}])
def test_nothing_is_sampled_where_nothing_can_be_measured(report):
    def sample(*_, **__):
        raise AssertionError("sampled for nothing")

    prompt = Prompt("a", ({"role": "user", "content": "?"},))
    subject = SimpleNamespace(
        task=RULES if report["questions"] == 0 else None,
        config=Config(report=report),
        sampler=SimpleNamespace(sample=sample),
        eval_prompts=lambda count: [prompt] * count,
    )
    assert measure_localisation(subject, ["grpo"]) == ([], {})


NUMBERED = "1. three\n2. four\n3. five\nAnswer: 5"
THREE = [(0, 9), (9, 17), (17, 25)]


@pytest.mark.parametrize(
    ("reward", "critique", "expected"),
    [
        (0.0, Feedback("text", first_error=1), [True, False, False]),
        (0.0, Feedback("text", first_error=0), [False, False, False]),
        (0.0, Feedback("text"), [True, True, True]),
        (0.0, Feedback("text", first_error=3), [True, True, True]),
        (1.0, Feedback("text", first_error=2), [True, True, False]),
        (1.0, Feedback(None, problem="timeout"), [True, True, True]),
        (1.0, None, [True, True, True]),
        (0.0, None, []),
        (None, None, []),
        (0.0, Feedback(None, first_error=1, problem="timeout"), []),
    ],
)
def test_steps_of_free_text_are_marked_by_the_critique(reward, critique, expected):
    prompt = Prompt("a", ({"role": "user", "content": "?"},))
    rollout = Rollout(prompt, 0, (1,), (0.0,), NUMBERED, False, reward)
    steps = marked_steps(None, rollout, critique)
    assert steps == tuple(Step(*span, right) for span, right in zip(THREE, expected, strict=False))


def test_a_task_that_judges_steps_needs_no_critique():
    prompt = Prompt("a", ({"role": "user", "content": "?"},))
    rollout = Rollout(prompt, 0, (1,), (0.0,), NUMBERED, False, 1.0)
    judged = [Step(0, 9, False)]
    task = SimpleNamespace(steps=lambda question, response: judged)
    assert marked_steps(task, rollout, Feedback("text")) == tuple(judged)
    silent = SimpleNamespace(steps=lambda question, response: [])
    assert [s.correct for s in marked_steps(silent, rollout, None)] == [True] * 3


def test_a_run_keeps_the_rollouts_that_its_report_shows(session, tmp_path):
    config = session.config.model_copy(update={"report": ReportConfig(questions=4, rollouts=7)})
    session = SimpleNamespace(**{**vars(session), "config": config, "critic": session.critic})
    _measure(session, tmp_path, ["grpo", "critique"])
    assert json.loads((tmp_path / "localisation.json").read_text()).keys() == {
        "reference",
        "critique",
    }
    groups = by_rollout(read_views(tmp_path / "advantages.parquet"))
    assert len(groups) == 7
    marked = [group[0].first_error is not None for group in groups]
    assert marked == sorted(marked, reverse=True) and marked[0]
    names = {"response", "profile", "distribution"}
    files = {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == files


def test_rows_without_a_task_are_measured_too(tmp_path):
    rows = [
        {"question": f"Say {i}", "answer": str(i), "solution": f"1. say\n2. {i}"} for i in range(3)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        condition="reference",
        threads=1,
        model={"name": str(build_tiny_llama(tmp_path / "model")), "dtype": "float32"},
        data={"train": str(data), "eval": str(data)},
        rollout={"max_new_tokens": 8},
        reward={"function": "exact"},
        report={"questions": 9, "samples": 2},
        optim={"steps": 1},
    )
    views, places = measure_localisation(Session(config, tmp_path / "run"), ["reference"])
    assert [v.context for v in views] == ["reference"] * 6
    assert all(v.taught and v.reward == 0.0 and v.steps == () for v in views)
    assert places["reference"].unplaced == 6
