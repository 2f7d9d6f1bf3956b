"""Users' reward functions, good and bad: of test_verify.py and of runs of many ranks."""

from __future__ import annotations

import zlib


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


def coin(completions, **columns):
    """Right half of the time, whatever the model knows: by a checksum of the text."""
    return [float(zlib.crc32(each[0]["content"].encode()) % 2) for each in completions]


def coin_for_some(prompts, completions, **columns):
    """As coin for two thirds of the questions; no response to the others is right."""
    chosen = [sum(map(ord, turns[-1]["content"])) % 3 > 0 for turns in prompts]
    return [reward * one for reward, one in zip(coin(completions), chosen, strict=True)]
