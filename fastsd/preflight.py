"""What a run's prompts would trip over late, found before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastsd.config import Config
from fastsd.errors import FastsdError
from fastsd.evaluation.solver import renderer_for
from fastsd.prompts.sources import required_fields
from fastsd.training.feedback import feedback_maker
from fastsd.types import Prompt

if TYPE_CHECKING:
    from fastsd.session import Session


def check_prompts(session: Session, config: Config) -> None:
    """Raises FastsdError for the prompts that a run under `config` cannot use.

    The self-teacher's prompt must begin as the student's does, and every question of the run must
    fit. Feedback needs no check: it is cut to the room that is left.
    """
    renderer = renderer_for(session.policy, config)
    count = config.optim.steps * config.rollout.prompts_per_step
    training = session.train_data.take(0, count, config.seed)
    template = feedback_maker(config, None).template
    if template is not None:
        renderer.check_template(template, like=training[0])
    for field, why in required_fields(config).items():
        missing = next((prompt.id for prompt in training if getattr(prompt, field) is None), None)
        if missing is not None:
            raise FastsdError(f"prompt {missing!r} has no {field}, but {why}")
    for prompt in _distinct([*training, *session.eval_prompts(config.eval.questions)]):
        renderer.check_question(prompt)


def _distinct(prompts: Iterable[Prompt]) -> Iterable[Prompt]:
    """Each object once: rows of a file come again in every epoch."""
    return {id(prompt): prompt for prompt in prompts}.values()
