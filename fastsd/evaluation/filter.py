"""Hard but learnable: which questions are worth training on (`fastsd.data` asks).

The solver answers each question filter.samples times. A question stays where it is neither solved
too often nor, with filter.above, too seldom; where the responses have the form that critiques are
aligned by; and where the critic, shown the question alone, answers it right: a critic that cannot
solve it could only guess where the attempt went wrong. The stages stand in this order, and the
critic is asked about what the others left. A verdict depends on the question, the model and the
seed, not on the other questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError
from fastsd.types import Critic, Prompt, Rollout

if TYPE_CHECKING:
    from fastsd.config import Config
    from fastsd.types import Reward

KEPT = "kept"
# Verdicts in the order of the stages.
VERDICTS = ("unscored", "too_easy", "hopeless", "format", "critic", KEPT)
_QUESTION_COLUMNS = ("prompt", "messages", "question", "problem")


class FilterError(FastsdError):
    """Questions or settings that cannot be filtered."""


class Filter:
    """Gives each question its verdict.

    sampler: the solver's. critic: asked where filter.critic_solves; None: not asked.
    """

    def __init__(self, config: Config, sampler: Any, reward: Reward, critic: Critic | None):
        self.settings, self.seed = config.filter, config.seed
        self.sampler, self.reward, self.critic = sampler, reward, critic

    def verdicts(self, prompts: Sequence[Prompt]) -> list[str]:
        """One of VERDICTS for each question."""
        from fastsd.rewards.functions import score_rollouts

        samples = self.settings.samples
        rollouts = self.sampler.sample(prompts, samples, key=(self.seed,))
        rewards = score_rollouts(self.reward, rollouts)
        groups = range(0, len(rollouts), samples)
        verdicts = [
            self._by_share(rewards[start : start + samples])
            or self._by_form(rollouts[start : start + samples])
            for start in groups
        ]
        left = [rollouts[start] for start, v in zip(groups, verdicts, strict=True) if v == KEPT]
        if self.critic is None or not left:
            return verdicts
        solved = iter(self._solved(self.critic, left))
        return ["critic" if v == KEPT and not next(solved) else v for v in verdicts]

    def _by_share(self, rewards: Sequence[float | None]) -> str | None:
        known = [reward >= 1.0 for reward in rewards if reward is not None]
        if not known:
            return "unscored"
        share = sum(known) / len(known)
        if share >= self.settings.below:
            return "too_easy"
        return "hopeless" if share <= self.settings.above else None

    def _by_form(self, rollouts: Sequence[Rollout]) -> str:
        from fastsd.tasks.steps import format_obeyed

        obeyed = sum(format_obeyed(rollout.text, self.settings.format) for rollout in rollouts)
        return KEPT if obeyed >= self.settings.format_share * len(rollouts) else "format"

    def _solved(self, critic: Critic, firsts: Sequence[Rollout]) -> list[bool]:
        """Whether the critic answers each question right: given the question alone, or for one that
        follows rules, in its critique of the first response."""
        from fastsd.critics.text import TextCritic
        from fastsd.rewards.functions import score_rollouts

        if isinstance(critic, TextCritic):
            texts = critic.solve([rollout.prompt for rollout in firsts])
        else:
            texts = [critique.text for critique in critic.critique(firsts)]
        answers = [
            replace(first, response_ids=(), logprobs=(), text=text)
            for first, text in zip(firsts, texts, strict=True)
            if text is not None
        ]
        scores = iter(score_rollouts(self.reward, answers))
        rewards = (None if text is None else next(scores) for text in texts)
        return [reward is not None and reward >= 1.0 for reward in rewards]


def row_of(prompt: Prompt) -> str:
    """A question as a line of JSON in the columns that fastsd reads.

    Raises FilterError for a column that would be read as another question, or is no JSON.
    """
    clash = next((name for name in _QUESTION_COLUMNS if name in prompt.columns), None)
    if clash is not None:
        raise FilterError(
            f"row {prompt.id}: the column {clash!r} is not the question, but would be read as one "
            "in the filtered file; rename or remove it in the data file"
        )
    alone = len(prompt.messages) == 1
    question = {"question": prompt.question} if alone else {"messages": list(prompt.messages)}
    own = {"id": prompt.id, **question, "answer": prompt.answer, "solution": prompt.solution}
    record = {name: value for name, value in own.items() if value is not None}
    for name, value in prompt.columns.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise FilterError(
                f"row {prompt.id}, column {name!r}: {error}; remove the column, or convert it to "
                "text or numbers"
            ) from error
    return json.dumps({**prompt.columns, **record})
