"""Why critique wins, measured: where does each context press on the solver's own tokens?

Before any training, the solver answers held-out questions; the self-teacher then reads the
reference solution or the critique of each answer, and A_t = log T(y_t) - log S(y_t) is taken on
each of the solver's tokens. A context that helps leaves right steps alone and presses on the wrong
one (arXiv 2606.11173, its advantage analysis).

What a context had nothing for (an invalid critique, no right sibling) has no advantage: it is left
out of the figures and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastsd.conditions import CONDITIONS
from fastsd.evaluation.localisation import Localisation, localisation, token_spans
from fastsd.evaluation.solver import Solver
from fastsd.evaluation.statistics import token_statistics
from fastsd.evaluation.views import TokenView
from fastsd.prompts.samples import make_samples
from fastsd.rewards.functions import score_rollouts
from fastsd.tasks.steps import parse_steps
from fastsd.types import Feedback, Prompt, Rollout, Sample, Step, Task

NO_ROOM = "no_room"


def measure_localisation(
    solver: Solver, conditions: Sequence[str]
) -> tuple[list[TokenView], dict[str, Localisation]]:
    """Views and localisation of every context that applies, on the same held-out rollouts.

    report.questions x report.samples rollouts of the present policy, scored by its reward;
    conditions: those that will run. The teacher is the policy itself, so call it before the first
    update. ([], {}) where no context applies. Raises CriticUnavailable where the critic is dead.
    """
    prompts = solver.eval_prompts(solver.config.report.questions)
    contexts = applicable_contexts(solver, conditions, prompts)
    if not prompts or not contexts:
        return [], {}
    rollouts = held_out_rollouts(solver, prompts)
    views = measure(solver, rollouts, contexts, solver.config.report.alternatives)
    return views, localise(rollouts, views, contexts)


def applicable_contexts(
    solver: Solver, conditions: Sequence[str], prompts: Sequence[Prompt]
) -> list[str]:
    """The contexts that can be measured without asking for more than the run itself does.

    reference: every question has a solution. critique: its rules are a task's, or a running
    condition asks the critic anyway. Others where they run.
    """
    asked = any(CONDITIONS[name].critic for name in conditions)
    has_rules = solver.task is not None and getattr(solver.task, "has_rules", True)
    applies = {
        "reference": all(prompt.solution is not None for prompt in prompts),
        "critique": asked or (solver.config.critic.kind == "rule" and has_rules),
    }
    taught = [name for name, condition in CONDITIONS.items() if condition.context]
    return [name for name in taught if applies.get(name, name in conditions)]


def held_out_rollouts(solver: Solver, prompts: Sequence[Prompt]) -> list[Rollout]:
    """report.samples scored responses to each prompt, in whole groups."""
    config = solver.config
    rollouts = solver.sampler.sample(
        list(prompts), config.report.samples, key=(config.eval.seed, 1)
    )
    rewards = score_rollouts(solver.reward, rollouts)
    return [replace(r, reward=value) for r, value in zip(rollouts, rewards, strict=True)]


def localise(
    rollouts: Sequence[Rollout], views: Sequence[TokenView], contexts: Sequence[str]
) -> dict[str, Localisation]:
    """Localisation by context of `measure`'s views; a rollout without teacher is unplaced."""
    found = {}
    for name in contexts:
        pairs = zip(rollouts, (v for v in views if v.context == name), strict=True)
        taught = [(rollout, view) for rollout, view in pairs if view.taught]
        placed = localisation(
            [rollout for rollout, _ in taught],
            [view.advantage for _, view in taught],
            [view.steps for _, view in taught],
            [view.spans for _, view in taught],
        )
        found[name] = placed + Localisation(unplaced=len(rollouts) - len(taught))
    return found


def measure(
    solver: Solver, rollouts: Sequence[Rollout], contexts: Sequence[str], alternatives: int
) -> list[TokenView]:
    """One view per rollout and context, the policy being its own teacher: the contexts of the first
    rollout, then of the next. rollouts: scored, whole groups in order. alternatives: how many of
    the teacher's likeliest tokens are kept of each position.

    Raises CriticUnavailable; LocalisationError where tokens and text do not fit.
    """
    critiques: list[Feedback | None] = [None] * len(rollouts)
    feedback, numbers = {}, {}
    for name in contexts:
        given = _feedback(solver, rollouts, name)
        if CONDITIONS[name].critic:
            critiques = list(given)
        template = getattr(solver.config.prompt, CONDITIONS[name].template or "")
        samples = make_samples(solver.renderer, template, rollouts, given)
        feedback[name] = [_as_shown(f, s) for f, s in zip(given, samples, strict=True)]
        numbers[name] = token_statistics(solver.policy, solver.config, samples, alternatives)
    views = []
    for index, rollout in enumerate(rollouts):
        shared = _shared_fields(solver, rollout, critiques[index])
        for name in contexts:
            shown = feedback[name][index]
            own = {"feedback": shown.text, "problem": shown.problem, **vars(numbers[name][index])}
            views.append(TokenView(context=name, **shared, **own))
    return views


def _shared_fields(solver: Solver, rollout: Rollout, critique: Feedback | None) -> dict[str, Any]:
    """What the views of a rollout have in common."""
    steps = marked_steps(solver.task, rollout, critique)
    tokenizer = solver.policy.tokenizer
    return {
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "question": rollout.prompt.question,
        "response": rollout.text,
        "answer": rollout.prompt.answer,
        "reward": rollout.reward,
        "steps": steps,
        "first_error": next((k for k, step in enumerate(steps) if not step.correct), None),
        "spans": tuple(token_spans(tokenizer, rollout.response_ids, rollout.text)),
    }


def marked_steps(
    task: Task | None, rollout: Rollout, critique: Feedback | None
) -> tuple[Step, ...]:
    """The response's steps, right or wrong: as the task judges them; else those before the first
    that a valid critique changes are right, it and later ones are not; else, of a right response,
    all are right. () where nothing tells."""
    if task is not None and (judged := task.steps(rollout.prompt.question, rollout.text)):
        return tuple(judged)
    parsed = parse_steps(rollout.text).steps
    if critique is not None and critique.text is not None:
        right = len(parsed) if critique.first_error is None else critique.first_error
    elif rollout.reward is not None and rollout.reward >= 1.0:
        right = len(parsed)
    else:
        return ()
    return tuple(Step(step.start, step.end, k < right) for k, step in enumerate(parsed))


def _feedback(solver: Solver, rollouts: Sequence[Rollout], name: str) -> list[Feedback]:
    condition = CONDITIONS[name]
    assert condition.context
    return condition.context(rollouts, solver.critic if condition.critic else None)


def _as_shown(given: Feedback, sample: Sample) -> Feedback:
    """Feedback that has no room beside question and response was not shown."""
    lost = given.text is not None and sample.teacher_ids is None
    return replace(given, text=None, problem=NO_ROOM) if lost else given
