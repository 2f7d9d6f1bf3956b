"""A batch of rollouts, judged, with feedback: what the updates that follow are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastsd.prompts.samples import make_samples
from fastsd.rewards.functions import group_advantages, score_rollouts
from fastsd.training.feedback import dropped_rollouts
from fastsd.types import Feedback, Prompt, Rollout, Sample

if TYPE_CHECKING:
    from fastsd.training.session import Session


def collect(session: Session) -> tuple[list[Sample], int]:
    """Samples for the next rollout.steps_per_batch updates, and where the data stands then.
    Collective: the ranks share the questions out."""
    rollout = session.config.rollout
    count = rollout.prompts_per_step * rollout.steps_per_batch
    prompts = session.train_data.take(session.cursor, count, session.config.seed)
    with session.clock.phase("rollout"):
        session.sampler.update_weights(session.step, rollout.max_staleness, session.placement)
    samples = session.placement.share_out(
        prompts, rollout.samples_per_prompt, lambda some: _roll_out(session, some), session.gate
    )
    return samples, session.cursor + count


def _roll_out(session: Session, prompts: list[Prompt]) -> list[Sample]:
    config, clock = session.config, session.clock
    with clock.phase("rollout"):
        rollouts = session.sampler.sample(
            prompts, config.rollout.samples_per_prompt, key=(config.seed, session.step)
        )
    clock.note(session.sampler.metrics())
    tokens = sum(len(r.response_ids) for r in rollouts)
    with clock.phase("rollout", tokens):
        rewards = score_rollouts(session.reward, rollouts)
    rollouts = [replace(r, reward=v) for r, v in zip(rollouts, rewards, strict=True)]
    with clock.phase("critic", tokens if session.maker.condition.context else 0):
        feedback = session.maker(rollouts)
    return samples_of(session, rollouts, feedback)


def samples_of(
    session: Session, rollouts: Sequence[Rollout], feedback: Sequence[Feedback]
) -> list[Sample]:
    """Whole groups of rollouts with their prompts rendered and advantages computed."""
    size = session.config.rollout.samples_per_prompt
    dropped = dropped_rollouts(rollouts, feedback, session.config.critic.on_invalid)
    rewards = [None if gone else r.reward for r, gone in zip(rollouts, dropped, strict=True)]
    advantages = [
        advantage
        for start in range(0, len(rollouts), size)
        for advantage in group_advantages(rewards[start : start + size])
    ]
    template = session.maker.template
    return make_samples(session.renderer, template, rollouts, feedback, advantages, dropped)
