"""The conditions, as data: what the self-teacher is shown, and how the loss terms are weighted.

A condition is a function from a rollout to feedback text, the name of the prompt template that
carries it, and two weights. Adding one means adding a row to CONDITIONS and a template; the
training loop does not know their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastsd.types import Critic, Feedback, Rollout


@dataclass(frozen=True)
class Condition:
    """One way to learn from a rollout.

    context: scored rollouts, whole groups in order -> the Feedback of each, or None where there
    is no teacher. template: the PromptConfig field that holds the teacher's user turn. divergence
    and policy: weights of the distillation term and of the GRPO term, unless the configuration sets
    its own. needs: the Prompt field without which a row has no context. critic: it asks the critic.
    """

    context: Callable[[Sequence[Rollout], Critic | None], list[Feedback]] | None
    template: str | None
    divergence: float
    policy: float
    needs: str | None = None
    critic: bool = False

    def weights(self, divergence: float | None, policy: float | None) -> tuple[float, float]:
        """Weights of the divergence and of the policy term: the configuration's, where it sets
        them (loss.divergence_weight, loss.policy_weight), else the condition's own."""
        return (
            self.divergence if divergence is None else divergence,
            self.policy if policy is None else policy,
        )


def reference_solution(rollouts: Sequence[Rollout], critic: Critic | None) -> list[Feedback]:
    """The dataset's own solution: somebody else's derivation, the same for the whole group."""
    return [Feedback(rollout.prompt.solution) for rollout in rollouts]


def step_aligned_critique(rollouts: Sequence[Rollout], critic: Critic | None) -> list[Feedback]:
    """Each rollout's own trace, right steps verbatim, the first wrong one corrected in place."""
    assert critic is not None
    return list(critic.critique(rollouts))


def sibling_solution(rollouts: Sequence[Rollout], critic: Critic | None) -> list[Feedback]:
    """Another response to the same question that was right, as in SDPO (arXiv 2601.20802): the next
    one after the rollout, round the group. Without one the rollout has no teacher."""
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append(rollout)
    feedback = []
    for rollout in rollouts:
        group = groups[rollout.prompt.id]
        at = next(i for i, other in enumerate(group) if other is rollout)
        others = group[at + 1 :] + group[:at]
        right = (other.text for other in others if other.reward is not None and other.reward >= 1.0)
        feedback.append(Feedback(next(right, None)))
    return feedback


CONDITIONS: dict[str, Condition] = {
    "grpo": Condition(None, None, divergence=0.0, policy=1.0),
    "reference": Condition(
        reference_solution, "reference_template", divergence=1.0, policy=0.0, needs="solution"
    ),
    "critique": Condition(
        step_aligned_critique, "critique_template", divergence=1.0, policy=0.0, critic=True
    ),
    "sibling": Condition(sibling_solution, "sibling_template", divergence=1.0, policy=0.0),
}
# What condition = "all" compares: the paper's three.
COMPARED = ("grpo", "reference", "critique")


def conditions_of(condition: str) -> list[str]:
    """The conditions that the setting `condition` runs."""
    return list(COMPARED) if condition == "all" else [condition]
