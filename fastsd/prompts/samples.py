"""Rollouts and their feedback to samples: both prompts rendered, ready for the loss."""

from __future__ import annotations

from collections.abc import Sequence

from fastsd.prompts.render import PromptRenderer
from fastsd.types import Feedback, Rollout, Sample


def make_samples(
    renderer: PromptRenderer,
    template: str | None,
    rollouts: Sequence[Rollout],
    feedback: Sequence[Feedback],
    advantages: Sequence[float] | None = None,
    dropped: Sequence[bool] | None = None,
) -> list[Sample]:
    """One sample for each rollout.

    template: carries the feedback to the teacher; None: there is no teacher. advantages: 0 where
    they are not given; dropped: none. Raises PromptError where the teacher's prompt does not begin
    with the tokens of the student's question, or does not fit.
    """
    prompts = {rollout.prompt.id: rollout.prompt for rollout in rollouts}
    rendered = {name: renderer.student(prompt) for name, prompt in prompts.items()}
    shared = {
        name: renderer.question_tokens(prompt, rendered[name])
        for name, prompt in prompts.items()
        if template
    }
    samples = []
    for rollout, given, advantage, gone in zip(
        rollouts,
        feedback,
        advantages or [0.0] * len(rollouts),
        dropped or [False] * len(rollouts),
        strict=True,
    ):
        student_ids = rendered[rollout.prompt.id]
        teacher_ids, cut = None, False
        if given.text is not None and not gone and template:
            prompt = renderer.teacher(rollout.prompt, template, given.text)
            teacher_ids, cut = (prompt.ids, prompt.cut) if prompt else (None, True)
        if teacher_ids is not None:
            tokens = shared[rollout.prompt.id]
            renderer.check_shared(rollout.prompt, tokens, student_ids, teacher_ids)
        samples.append(Sample(rollout, student_ids, teacher_ids, advantage, given, cut, gone))
    return samples
