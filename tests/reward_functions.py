"""Users' reward functions for test_verify.py, good and bad."""

from __future__ import annotations


def lengths(prompts, completions, completion_ids, level, **columns):
    assert prompts[0][-1]["role"] == "user"
    return [
        None if lv is None else len(ids) + len(c[0]["content"]) + lv
        for c, ids, lv in zip(completions, completion_ids, level, strict=True)
    ]


def only_completions(completions):
    return [1 for _ in completions]


def explodes(completions, **columns):
    return [1 / 0 for _ in completions]


def one_too_many(completions, **columns):
    return [0.0] * (len(completions) + 1)


def text(completions, **columns):
    return ["1.0" for _ in completions]


def not_a_number(completions, **columns):
    return [float("nan") for _ in completions]


def not_a_list(completions, **columns):
    return 1.0


NOT_CALLABLE = 3
