"""The conditions, as data: what the self-teacher is shown, and how the loss terms are weighted.

A condition is a function from a rollout to feedback text, the name of the prompt template that
carries it, and two weights. Adding one means adding a row to CONDITIONS and a template; the
training loop does not know their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastsd.config import Config
from fastsd.types import Critic, FastsdError, Feedback, Rollout, Task

# What the critic may look at, by critic.sees.
_SEEN = {
    "question": lambda prompt: None,
    "answer": lambda prompt: prompt.answer,
    "solution": lambda prompt: prompt.solution,
}


@dataclass(frozen=True)
class Condition:
    """One way to learn from a rollout.

    context: rollout -> Feedback, or None where there is no teacher. template: the PromptConfig
    field that holds the teacher's user turn. divergence and policy: weights of the distillation
    term and of the GRPO term, unless the configuration sets its own. needs: the Prompt field
    without which a row has no context.
    """

    context: Callable[[Rollout, Critic | None, str], Feedback] | None
    template: str | None
    divergence: float
    policy: float
    needs: str | None = None


def reference_solution(rollout: Rollout, critic: Critic | None, sees: str) -> Feedback:
    """The dataset's own solution: somebody else's derivation, the same for the whole group."""
    return Feedback(rollout.prompt.solution)


def step_aligned_critique(rollout: Rollout, critic: Critic | None, sees: str) -> Feedback:
    """The rollout's own trace, right steps verbatim, the first wrong one corrected in place."""
    if critic is None:
        raise FastsdError('critic.kind = "rule" needs data.task: only a task brings a rule critic')
    prompt = rollout.prompt
    critique = critic.critique(prompt.question, rollout.text, _SEEN[sees](prompt))
    return Feedback(critique.text, critique.first_error)


CONDITIONS: dict[str, Condition] = {
    "grpo": Condition(None, None, divergence=0.0, policy=1.0),
    "reference": Condition(
        reference_solution, "reference_template", divergence=1.0, policy=0.0, needs="solution"
    ),
    "critique": Condition(step_aligned_critique, "critique_template", divergence=1.0, policy=0.0),
}


@dataclass(frozen=True)
class FeedbackMaker:
    """Gives every rollout its feedback under one condition."""

    condition: Condition
    critic: Critic | None
    config: Config

    def __call__(self, rollouts: list[Rollout]) -> list[Feedback]:
        if self.condition.context is None:
            return [Feedback(None) for _ in rollouts]
        return [self.condition.context(r, self.critic, self.config.critic.sees) for r in rollouts]

    @property
    def template(self) -> str | None:
        return self.condition.template and getattr(self.config.prompt, self.condition.template)

    @property
    def divergence_weight(self) -> float:
        own = self.config.loss.divergence_weight
        return self.condition.divergence if own is None else own

    @property
    def policy_weight(self) -> float:
        own = self.config.loss.policy_weight
        return self.condition.policy if own is None else own


def required_fields(config: Config) -> dict[str, str]:
    """Prompt fields that no training row may lack, each with the reason."""
    needs = {}
    if (field := CONDITIONS[config.condition].needs) is not None:
        needs[field] = f'condition = "{config.condition}" shows it to the teacher'
    if config.reward.function in ("exact", "math"):
        needs["answer"] = f'reward.function = "{config.reward.function}" compares with it'
    return needs


def feedback_maker(config: Config, task: Task | None) -> FeedbackMaker:
    """The condition that the configuration names, with its critic."""
    return FeedbackMaker(CONDITIONS[config.condition], task, config)
