"""Why critique wins, measured: where does each context press on the solver's own tokens?

Before any training, the solver answers held-out questions; for every wrong answer the self-teacher
then reads the reference solution or the critique, and A_t = log T(y_t) - log S(y_t) is taken on
each of the solver's tokens. A context that helps leaves right steps alone and presses on the wrong
one (arXiv 2606.11173, its advantage analysis).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsd.advantage import Localisation, localisation, token_spans
from fastsd.deferred import Passes
from fastsd.feedback import COMPARED, CONDITIONS
from fastsd.layout import Sample, micro_batches
from fastsd.phases import PhaseClock
from fastsd.sections import TeacherConfig
from fastsd.session import Session
from fastsd.teacher import Teacher
from fastsd.types import Feedback, Rollout
from fastsd_kernels import fused_linear_statistics

QUESTIONS = 64
SAMPLES = 4


@torch.no_grad()
def measure_localisation(session: Session) -> dict[str, Localisation]:
    """Localisation of every context, on the same rollouts of the session's present policy.

    Needs a task with checkable steps; {} without one. The teacher is the policy itself, so call it
    before the first update.
    """
    if session.task is None:
        return {}
    prompts = session.eval_prompts(min(QUESTIONS, session.config.eval.questions))
    rollouts = session.sampler.sample(prompts, SAMPLES, key=(session.config.eval.seed, 1))
    tokenizer = session.policy.tokenizer
    steps = [session.task.steps(r.prompt.question, r.text) for r in rollouts]
    spans = [token_spans(tokenizer, r.response_ids, r.text) for r in rollouts]
    contexts = [name for name in COMPARED if CONDITIONS[name].context]
    return {
        name: localisation(rollouts, context_advantages(session, rollouts, name), steps, spans)
        for name in contexts
    }


def context_advantages(
    session: Session, rollouts: Sequence[Rollout], condition: str
) -> list[list[float]]:
    """A_t for every response token of every rollout, the policy being its own teacher."""
    policy, samples = session.policy, _samples(session, rollouts, condition)
    teacher = Teacher(policy, TeacherConfig(kind="live"))
    advantages: dict[int, list[float]] = {}
    for batch in micro_batches(samples, session.config.optim.micro_batch_tokens):
        passes = Passes(policy, teacher, batch, PhaseClock(policy.device))
        for part in batch.parts:
            advantage_T = _advantages(session, part, passes)
            lengths = [len(sample.rollout.response_ids) for sample in part]
            for sample, values_T in zip(part, advantage_T.split(lengths), strict=True):
                advantages[id(sample)] = values_T.tolist()
    return [advantages[id(sample)] for sample in samples]


def _advantages(session: Session, part: Sequence[Sample], passes: Passes) -> torch.Tensor:
    """[T] over the response tokens of the part."""
    policy, config = session.policy, session.config
    ids = [i for sample in part for i in sample.rollout.response_ids]
    student_TD = passes.student(part)
    statistics = fused_linear_statistics(
        student_TD,
        policy.head_VD,
        torch.tensor(ids, device=policy.device),
        teacher_TD=passes.teacher(part, student_TD),
        temperature=config.rollout.temperature,
        impl=config.loss.impl,
        **policy.head_options(),
    )
    assert statistics.teacher_logprob_T is not None
    return statistics.teacher_logprob_T - statistics.student_logprob_T


def _samples(session: Session, rollouts: Sequence[Rollout], name: str) -> list[Sample]:
    condition = CONDITIONS[name]
    assert condition.context and condition.template
    feedback = condition.context(rollouts, session.critic if condition.critic else None)
    template = getattr(session.config.prompt, condition.template)
    return [_sample(session, r, f, template) for r, f in zip(rollouts, feedback, strict=True)]


def _sample(session: Session, rollout: Rollout, feedback: Feedback, template: str) -> Sample:
    # No feedback, no pressure: the teacher then sees what the student sees.
    student_ids = session.renderer.student(rollout.prompt)
    teacher_ids = student_ids
    if feedback.text is not None:
        prompt = session.renderer.teacher(rollout.prompt, template, feedback.text)
        teacher_ids = prompt.ids if prompt else student_ids
    return Sample(rollout, student_ids, teacher_ids, 0.0, feedback.text)
