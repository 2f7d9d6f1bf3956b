"""The rule-based critic of a procedural task."""

from __future__ import annotations

from collections.abc import Sequence

from fastsd.config.sections import CriticConfig
from fastsd.types import Critique, Prompt, Rollout, Task


class RuleCritic:
    """`fastsd.types.Critic` from the task's own rules."""

    def __init__(self, task: Task, config: CriticConfig):
        self.task, self.sees = task, config.sees
        self.name = f"rule ({task.name}, {config.variant})"

    def critique(self, rollouts: Sequence[Rollout]) -> list[Critique]:
        return [
            self.task.critique(r.prompt.question, r.text, reference_of(r.prompt, self.sees))
            for r in rollouts
        ]


def reference_of(prompt: Prompt, sees: str) -> str | None:
    """What critic.sees lets a critic know beside question and attempt."""
    return {"question": None, "answer": prompt.answer, "solution": prompt.solution}[sees]
