"""Is a critique one? What is not is a counted problem, never feedback.

    empty            nothing but white space
    special_tokens   text that the solver's tokenizer would read as one of its own marks
    copied_prompt    lines of our request, between whose marks the material stood
    unparsed         no steps, in the attempt or in the critique, where quoting needs both
    not_verbatim     a right attempt, of which too few steps are repeated before the first change
    wrong_answer     the run's own reward function finds its final answer wrong

Steps are compared by what stands within their marks, white space folded, so `1. x` repeats
`Step 1: x`. The reward function judges the critique's text here; an attempt's reward is never
touched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from fastsd.config.sections import CriticConfig
from fastsd.critics.prompt import MARK
from fastsd.prompts.render import special_pattern
from fastsd.rewards.functions import score_rollouts
from fastsd.tasks.steps import TextStep, parse_steps
from fastsd.types import Critique, Reward, Rollout


def validate_all(
    texts: Sequence[str],
    rollouts: Sequence[Rollout],
    config: CriticConfig,
    reward: Reward | None = None,
    tokenizer=None,
) -> list[Critique]:
    """A critique for each text, written for the rollout beside it: `text` is None where there is a
    `problem`. All answers are scored in one call, those of prompts with an answer only; one that
    has no score (None) is not wrong. Without reward or tokenizer, their checks are left out."""
    special = None if tokenizer is None else special_pattern(tokenizer)
    critiques = [
        _validate(text, rollout, config, special)
        for text, rollout in zip(texts, rollouts, strict=True)
    ]
    asked = [
        i
        for i, critique in enumerate(critiques)
        if critique.problem is None and rollouts[i].prompt.answer is not None
    ]
    if reward is None:
        return critiques
    scored = score_rollouts(reward, [_answering(rollouts[i], texts[i], tokenizer) for i in asked])
    for i, score in zip(asked, scored, strict=True):
        if score is not None and score < 1.0:
            critiques[i] = replace(critiques[i], text=None, problem="wrong_answer")
    return critiques


def _validate(
    text: str, rollout: Rollout, config: CriticConfig, special: re.Pattern | None
) -> Critique:
    if not text.strip():
        return Critique(None, problem="empty")
    if special is not None and special.search(text):
        return Critique(None, problem="special_tokens")
    if any(match.group() not in rollout.text for match in MARK.finditer(text)):
        return Critique(None, problem="copied_prompt")
    if config.quoting == "none":
        return Critique(text)
    attempt, critique = parse_steps(rollout.text).steps, parse_steps(text).steps
    if not attempt or not critique:
        return Critique(None, problem="unparsed")
    repeated = _repeated(attempt, critique)
    share = repeated / len(attempt)
    first_error = _first_error(attempt, critique, repeated, config.quoting)
    right = rollout.reward is not None and rollout.reward >= 1.0
    if config.quoting == "verbatim" and right and share < config.min_verbatim:
        return Critique(None, first_error, "not_verbatim", share)
    return Critique(text, first_error, prefix_share=share)


def _repeated(attempt: Sequence[TextStep], critique: Sequence[TextStep]) -> int:
    """How many leading steps of the attempt the critique repeats."""
    count = 0
    for theirs, ours in zip(attempt, critique, strict=False):
        if _folded(theirs) != _folded(ours):
            break
        count += 1
    return count


def _first_error(
    attempt: Sequence[TextStep], critique: Sequence[TextStep], repeated: int, quoting: str
) -> int | None:
    """Index of the attempt's first step that the critique changes; None where it changes none.

    With full quoting the wrong step is the last that is repeated, unless the remark on it stands in
    the same step.
    """
    if repeated == len(attempt) == len(critique):
        return None
    if quoting == "verbatim":
        return repeated if repeated < len(attempt) else None
    here = zip(attempt[repeated:], critique[repeated:], strict=False)
    remarked = any(_folded(ours).startswith(_folded(theirs)) for theirs, ours in [*here][:1])
    return repeated if remarked else max(repeated - 1, 0)


def _folded(step: TextStep) -> str:
    return " ".join(step.body.split())


def _answering(rollout: Rollout, text: str, tokenizer) -> Rollout:
    """The critique as if it were the response, for the reward function to look at."""
    ids = () if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]
    return replace(rollout, text=text, response_ids=tuple(ids), logprobs=(), reward=None)
