"""Token views made by hand, for tests of what is drawn and stored."""

from __future__ import annotations

from collections.abc import Sequence

from fastsd.evaluation.views import TokenView
from fastsd.types import Step


def make_view(
    context: str = "critique",
    advantage: Sequence[float] = (0.0, -2.0, 0.5, 0.25),
    *,
    prompt_id: str = "q0",
    sample: int = 0,
    response: str = "ab\ncd",
    steps: Sequence[Step] = (Step(0, 1, True), Step(1, 3, False), Step(3, 5, False)),
    reward: float | None = 0.0,
    problem: str | None = None,
    **fields,
) -> TokenView:
    """A view whose tokens are characters of the response, the last one a stop token."""
    tokens = len(advantage)
    end = len(response)
    values = {
        "question": "What?",
        "answer": "7",
        "feedback": None if problem else "a\nB\ncd",
        "first_error": next((k for k, step in enumerate(steps) if not step.correct), None),
        "spans": tuple((min(i, end), min(i + 1, end)) for i in range(tokens)),
        "student_logprob": (-1.0,) * tokens,
        "teacher_logprob": () if problem else tuple(a - 1.0 for a in advantage),
        "divergence": () if problem else (0.125,) * tokens,
        "entropy": (0.5,) * tokens,
        "alternatives": () if problem else ((("x", -0.5), ("\n", -1.5)),) * tokens,
    }
    return TokenView(
        context=context,
        prompt_id=prompt_id,
        sample=sample,
        response=response,
        reward=reward,
        problem=problem,
        steps=tuple(steps),
        **{**values, **fields},
    )
