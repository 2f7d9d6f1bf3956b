"""The rule-based critic: one critique per rollout, and only what critic.sees lets through."""

from __future__ import annotations

import pytest

from fastsd.config import Config
from fastsd.config.sections import CriticConfig
from fastsd.critics import open_critic
from fastsd.critics.rule import RuleCritic, reference_of
from fastsd.tasks import load_task
from fastsd.types import Critique, Prompt, Rollout


class Recording:
    """A task that remembers what its critique is shown."""

    name = "recording"

    def __init__(self):
        self.seen = []

    def critique(self, question, trace, reference):
        self.seen.append((question, trace, reference))
        return Critique(trace.upper(), first_error=0)


def rollout_of(question: str, text: str) -> Rollout:
    prompt = Prompt(question, ({"role": "user", "content": question},), "A", "S")
    return Rollout(prompt, 0, (1,), (0.0,), text, False, reward=0.25)


@pytest.mark.parametrize(
    ("sees", "shown"), [("question", None), ("answer", "A"), ("solution", "S")]
)
def test_one_critique_per_rollout_in_order(sees, shown):
    task, rollouts = Recording(), [rollout_of("q1", "a"), rollout_of("q2", "b")]
    critic = RuleCritic(task, CriticConfig(sees=sees))
    assert [c.text for c in critic.critique(rollouts)] == ["A", "B"]
    assert task.seen == [("q1", "a", shown), ("q2", "b", shown)]
    assert [r.reward for r in rollouts] == [0.25, 0.25]
    assert reference_of(rollouts[0].prompt, sees) == shown


def test_a_task_gets_its_rules_and_rows_get_none(tmp_path):
    task = load_task("chain_sum")
    critic = open_critic(Config(data={"task": "chain_sum"}), task, tmp_path)
    assert critic is not None and critic.name == "rule (chain_sum, local)"
    prompt = task.prompt("train", 0)
    attempt = Rollout(prompt, 0, (1,), (0.0,), prompt.solution or "", False, 1.0)
    assert critic.critique([attempt])[0].first_error is None
    assert open_critic(Config(condition="grpo"), None, tmp_path) is None
    assert list(tmp_path.iterdir()) == []
