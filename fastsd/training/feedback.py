"""Rollouts to feedback, under the condition of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastsd.conditions import CONDITIONS, Condition
from fastsd.config import Config
from fastsd.types import Critic, Feedback, Rollout


@dataclass(frozen=True)
class FeedbackMaker:
    """Gives every rollout its feedback under one condition."""

    condition: Condition
    critic: Critic | None
    config: Config

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Feedback]:
        if self.condition.context is None:
            return [Feedback(None) for _ in rollouts]
        return self.condition.context(rollouts, self.critic)

    @property
    def template(self) -> str | None:
        return self.condition.template and getattr(self.config.prompt, self.condition.template)

    @property
    def weights(self) -> tuple[float, float]:
        """Of the divergence and of the policy term."""
        loss = self.config.loss
        return self.condition.weights(loss.divergence_weight, loss.policy_weight)


def dropped_rollouts(
    rollouts: Sequence[Rollout], feedback: Sequence[Feedback], on_invalid: str
) -> list[bool]:
    """Which rollouts count for nothing because critic.on_invalid says so: those whose feedback has
    a problem, or their whole groups; none with "reward_only"."""
    bad = [given.problem is not None for given in feedback]
    if on_invalid == "reward_only":
        return [False] * len(bad)
    if on_invalid == "drop_rollout":
        return bad
    groups = {r.prompt.id for r, is_bad in zip(rollouts, bad, strict=True) if is_bad}
    return [rollout.prompt.id in groups for rollout in rollouts]


def feedback_maker(config: Config, critic: Critic | None) -> FeedbackMaker:
    """The condition that the configuration names, with its critic."""
    return FeedbackMaker(CONDITIONS[config.condition], critic, config)
