"""A batch of rollouts, judged, with feedback: what the updates that follow are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastsd.prompts.samples import make_samples
from fastsd.rewards.functions import group_advantages, score_rollouts
from fastsd.training.feedback import dropped_rollouts
from fastsd.training.parts import Parts
from fastsd.types import Feedback, Prompt, Rollout, Sample


def collect(parts: Parts) -> tuple[list[Sample], int]:
    """Samples for the next rollout.steps_per_batch updates, and where the data stands then.
    Collective: the ranks share the questions out."""
    rollout = parts.config.rollout
    count = rollout.prompts_per_step * rollout.steps_per_batch
    prompts = parts.train_data.take(parts.cursor, count, parts.config.seed)
    with parts.clock.phase("rollout"):
        parts.sampler.update_weights(parts.step, rollout.max_staleness, parts.placement)
    samples = parts.placement.share_out(
        prompts, rollout.samples_per_prompt, lambda some: _roll_out(parts, some), parts.gate
    )
    return samples, parts.cursor + count


def _roll_out(parts: Parts, prompts: list[Prompt]) -> list[Sample]:
    config, clock = parts.config, parts.clock
    with clock.phase("rollout"):
        rollouts = parts.sampler.sample(
            prompts, config.rollout.samples_per_prompt, key=(config.seed, parts.step)
        )
    clock.note(parts.sampler.metrics())
    tokens = sum(len(r.response_ids) for r in rollouts)
    with clock.phase("rollout", tokens):
        rewards = score_rollouts(parts.reward, rollouts)
    rollouts = [replace(r, reward=v) for r, v in zip(rollouts, rewards, strict=True)]
    with clock.phase("critic", tokens if parts.maker.condition.context else 0):
        feedback = parts.maker(rollouts)
    return samples_of(parts, rollouts, feedback)


def samples_of(
    parts: Parts, rollouts: Sequence[Rollout], feedback: Sequence[Feedback]
) -> list[Sample]:
    """Whole groups of rollouts with their prompts rendered and advantages computed."""
    size = parts.config.rollout.samples_per_prompt
    dropped = dropped_rollouts(rollouts, feedback, parts.config.critic.on_invalid)
    rewards = [None if gone else r.reward for r, gone in zip(rollouts, dropped, strict=True)]
    advantages = [
        advantage
        for start in range(0, len(rollouts), size)
        for advantage in group_advantages(rewards[start : start + size])
    ]
    template = parts.maker.template
    return make_samples(parts.renderer, template, rollouts, feedback, advantages, dropped)
