"""What the teacher is shown under each condition, and what an invalid critique drops."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastsd.conditions import CONDITIONS
from fastsd.config import Config
from fastsd.training.feedback import dropped_rollouts, feedback_maker
from fastsd.types import Critique, Feedback, Prompt, Rollout


def group(name: str, rewards: list[float | None]) -> list[Rollout]:
    prompt = Prompt(name, ({"role": "user", "content": name},), solution=f"solution of {name}")
    return [
        Rollout(prompt, i, (1,), (0.0,), f"{name}{i}", False, reward)
        for i, reward in enumerate(rewards)
    ]


def shown(condition: str, rollouts: list[Rollout]) -> list[str | None]:
    maker = feedback_maker(Config(condition=condition), None)
    return [feedback.text for feedback in maker(rollouts)]


@pytest.mark.parametrize(
    ("rewards", "siblings"),
    [
        # The next right one, round the group, and never the rollout itself.
        ([1.0, 0.0, 1.0, 0.0], ["a2", "a2", "a0", "a0"]),
        ([0.0, 1.0, 0.0], ["a1", None, "a1"]),
        ([0.0, 0.0], [None, None]),
        ([None, 0.9, 0.0], [None, None, None]),
        ([1.0], [None]),
        ([1.0, 1.0], ["a1", "a0"]),
    ],
)
def test_a_sibling_is_another_right_response_to_the_same_question(rewards, siblings):
    assert shown("sibling", group("a", rewards)) == siblings


def test_siblings_never_come_from_another_question():
    rollouts = group("a", [0.0, 0.0]) + group("b", [1.0, 0.0])
    assert shown("sibling", rollouts) == [None, None, None, "b0"]


def test_identical_rollouts_are_told_apart():
    """Equal dataclasses: the sibling is found by place, not by value."""
    prompt = Prompt("a", ({"role": "user", "content": "a"},))
    twins = [Rollout(prompt, 0, (1,), (0.0,), "same", False, 1.0) for _ in range(2)]
    assert shown("sibling", twins) == ["same", "same"]
    assert shown("sibling", twins[:1]) == [None]
    other = replace(twins[0], text="other")
    assert shown("sibling", [*twins, other]) == ["same", "other", "same"]


def test_the_reference_is_the_same_for_the_group_and_grpo_shows_nothing():
    rollouts = group("a", [0.0, 1.0])
    assert shown("reference", rollouts) == ["solution of a"] * 2
    assert shown("grpo", rollouts) == [None, None]


def test_the_critique_carries_all_that_the_critic_says():
    class Scripted:
        name = "scripted"

        def critique(self, rollouts):
            return [Critique(None, None, "timeout"), Critique("text", 2, None, 0.5)]

    maker = feedback_maker(Config(condition="critique"), Scripted())
    assert maker(group("a", [0.0, 1.0])) == [
        Critique(None, None, "timeout"),
        Critique("text", 2, None, 0.5),
    ]
    assert [name for name, one in CONDITIONS.items() if one.critic] == ["critique"]


@pytest.mark.parametrize(
    ("on_invalid", "dropped"),
    [
        ("drop_rollout", [False, True, False, False, False]),
        ("drop_group", [True, True, False, False, False]),
        ("reward_only", [False, False, False, False, False]),
    ],
)
def test_what_an_invalid_critique_drops(on_invalid, dropped):
    rollouts = group("a", [0.0, 0.0]) + group("b", [1.0, 0.0, None])
    # No feedback without a problem (a sibling that is not there) drops nothing.
    feedback = [Feedback("x"), Feedback(None, problem="empty"), *[Feedback(None)] * 3]
    assert dropped_rollouts(rollouts, feedback, on_invalid) == dropped
    assert dropped_rollouts([], [], on_invalid) == []
