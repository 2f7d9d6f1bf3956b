"""Token views for the page's tests, made by hand or at random: no model is needed for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastsd.evaluation.views import TokenView
from fastsd.types import Step

RESPONSE = "b+3=e;e+d=c;c+2=e;"
CRITIQUE = "b+3=e;e+d=b;b+2=d;"
REFERENCE = "3+b=e;d+e=b;2+b=d;"


def spans_of(texts):
    ends = np.cumsum([len(text) for text in texts]).tolist()
    return tuple(zip([0, *ends[:-1]], ends, strict=True)) if texts else ()


def view_of(texts, advantage, **changes) -> TokenView:
    """A view whose tokens are `texts`; log S is -0.5 everywhere."""
    count = len(texts)
    plain = TokenView(
        context="critique",
        prompt_id="q",
        sample=0,
        question="?",
        response="".join(texts),
        answer=None,
        reward=0.0,
        feedback="do better",
        problem=None,
        steps=(),
        first_error=None,
        spans=spans_of(texts),
        student_logprob=(-0.5,) * count,
        teacher_logprob=tuple(-0.5 + a for a in advantage),
        divergence=(0.25,) * count,
        entropy=(0.75,) * count,
        alternatives=((("x", -0.1), ("y", -3.0)),) * count,
    )
    return replace(plain, **changes)


def chain_sum_views(question="b3d2") -> list[TokenView]:
    """A wrong attempt under both contexts, as the embedded task has them; the last token is a stop
    token, which writes no text."""
    texts = [*RESPONSE, ""]
    steps = tuple(Step(at, at + 6, at == 0) for at in (0, 6, 12))
    critique = [0.0] * 19
    critique[10] = -5.0
    reference = [-0.3, 0.0, 0.5, *[0.0] * 7, -4.5, 0.0, -1.5, *[0.0] * 6]
    shared = {"question": question, "steps": steps, "first_error": 1, "answer": "d"}
    return [
        view_of(texts, reference, context="reference", feedback=REFERENCE, **shared),
        view_of(texts, critique, feedback=CRITIQUE, **shared),
    ]


def random_views(rollouts: int, tokens: int, seed: int = 0) -> list[TokenView]:
    """Noise where a page expects structure: no two neighbours agree, nothing compresses well.

    Texts are of four characters a token, in numbered steps; critiques repeat the steps before the
    error and differ after it.
    """
    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))
    known = [" " + "".join(word) for word in letters[draw.integers(0, 36, (20_000, 3))]]
    known[:100] = [" a<b"] * 50 + [" &lt"] * 50

    def words(count):
        return [known[at] for at in draw.integers(0, len(known), count).tolist()]

    views = []
    for number in range(rollouts):
        texts, steps, wrong = [], [], 10
        for step in range(20):
            start = sum(map(len, texts))
            texts += [f"\nStep {step + 1}:", *words(tokens // 20 - 1)]
            steps.append(Step(start, sum(map(len, texts)), step < wrong))
        texts += words(tokens - len(texts))
        response, half = "".join(texts), steps[wrong].start
        feedback = response[:half] + "".join(
            f"\nStep {k + 1}:" + "".join(words(tokens // 20 - 1)) for k in range(wrong, 20)
        )
        student = {
            "student_logprob": tuple((-draw.exponential(1, tokens)).tolist()),
            "entropy": tuple(draw.exponential(1, tokens).tolist()),
        }
        solution = "".join(words(500))
        for context, shown in (("reference", solution), ("critique", feedback)):
            choices = words(3 * tokens)
            advantage = draw.normal(0, 1.5, tokens)
            views.append(
                view_of(
                    texts,
                    [0.0] * tokens,
                    context=context,
                    prompt_id=f"q{number}",
                    question="".join(words(60)),
                    response=response,
                    feedback=shown,
                    steps=tuple(steps),
                    first_error=wrong,
                    **student,
                    teacher_logprob=tuple((advantage + student["student_logprob"]).tolist()),
                    divergence=tuple(draw.exponential(1, tokens).tolist()),
                    alternatives=tuple(
                        ((a, -0.2), (b, -2.0), (c, -4.0))
                        for a, b, c in zip(choices[::3], choices[1::3], choices[2::3], strict=True)
                    ),
                )
            )
    return views
