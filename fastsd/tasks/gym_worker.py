"""A process that makes reasoning-gym questions and scores answers; fastsd.tasks.gym starts it.

Run as `python -P gym_worker.py`; it imports reasoning-gym and fastsd's sandbox, never torch. Lines
on stdin are JSON objects whose "do" names a function below; each is answered by one line of JSON.

Some scorers hand the answer to Python's `eval`, directly or by sympy's `parse_expr`. So an answer
is only ever scored in a child that fastsd/runtime/sandbox.py forks, limits and kills, and there its
audit hook refuses to compile text. Where that would refuse right answers too, which are formulas,
a formula is let through: numbers, single letters, operators, brackets and the functions of
`FORMULA`, a language without strings, attributes or subscripts in which nothing else can be named.
Text that is the dataset's own, such as the question's expression, may be compiled too.

An entry of a dataset is never sent to and fro: (dataset, config, seed, index) makes it again. Every
draw has one owner: a quarter of all question texts, chosen by hash, is held out. Questions with
an answer that their own scorer does not accept are passed over. Dataset code is trusted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fastsd.runtime import sandbox

# One question text in so many belongs to the eval split.
HELD_OUT = 4
# Draws that a question is chosen from; that none of them is held out has a chance of 1e-8.
DRAWS = 64
# Items of one dataset object. A split's questions walk through objects of different seeds.
BLOCK = 1024
# Some datasets seed numpy, whose seeds have 32 bits.
_SEEDS = 2**32 - BLOCK

_FUNCTIONS = (
    "sqrt exp log ln pi abs Abs sin cos tan sec csc cot asin acos atan sinh cosh tanh "
    "asinh acosh atanh"
)
# Possessive: without it a long number that is no formula would take exponential time.
FORMULA = re.compile(
    r"(?:[-+*/^()!, \t\n]|[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++"
    rf"|(?:{'|'.join(_FUNCTIONS.split())}|[A-Za-z])(?![A-Za-z0-9_.]))*+"
)
_WORKED = re.compile(r"\n#### *([^\n]+)\s*\Z")


@functools.lru_cache(maxsize=16)
def dataset_of(name: str, config: str, seed: int) -> Any:
    """The dataset object of BLOCK items; config is JSON. Raises whatever the dataset does."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=BLOCK, **json.loads(config))


@functools.lru_cache(maxsize=4096)
def entry_of(name: str, config: str, seed: int, index: int) -> dict[str, Any]:
    """One item. Scored once with its own answer, so that no child pays for late imports."""
    dataset = dataset_of(name, config, seed)
    # Some generators forget their own generator of random numbers and use Python's.
    random.seed(f"{seed}/{index}")
    entry = dataset[index]
    answer = entry["answer"]
    entry["usable"] = answer is None or is_exactly_one(dataset.score_answer(answer, entry))
    return entry


def is_exactly_one(score: Any) -> bool:
    return isinstance(score, (int, float)) and score == 1.0


def describe(dataset: str) -> dict[str, Any]:
    """All datasets' names, and the configuration fields of one of them."""
    from reasoning_gym.factory import DATASETS

    known = DATASETS.get(dataset)
    fields = [field.name for field in dataclasses.fields(known[1])] if known else []
    return {"datasets": sorted(DATASETS), "fields": fields}


def make(dataset: str, config: str, seed: int, split: str, index: int) -> dict[str, Any]:
    """Question `index` of a split: the first of its DRAWS that the split owns and can be scored."""
    for draw in range(index * DRAWS, (index + 1) * DRAWS):
        block, item = divmod(draw, BLOCK)
        block_seed = _hash(f"{seed}/{block}") % _SEEDS
        entry = entry_of(dataset, config, block_seed, item)
        held_out = _hash(entry["question"]) % HELD_OUT == 0
        if held_out == (split == "eval") and entry["usable"]:
            return {
                "question": entry["question"],
                "answer": None if entry["answer"] is None else str(entry["answer"]),
                "solution": worked_solution(entry),
                "dataset_seed": block_seed,
                "dataset_index": item,
            }
    return {"error": f"none of {DRAWS} draws can be a question of split {split}: too few differ"}


def worked_solution(entry: dict[str, Any]) -> str | None:
    """gsm_symbolic's derivation, its last line `<answer>42</answer>`; None for other datasets."""
    derivation = entry["metadata"].get("answer_cot")
    if derivation is None:
        return None
    return _WORKED.sub(lambda match: f"\n<answer>{match[1]}</answer>", derivation)


def score(
    dataset: str,
    config: str,
    dataset_seed: int,
    dataset_index: int,
    prompt: str,
    answer: str,
    timeout_s: float,
) -> dict[str, str]:
    """The verdict on one answer: "right" (exactly 1.0), "wrong" or "timeout"; "changed" where the
    dataset makes another question now than the one in the prompt."""
    entry = entry_of(dataset, config, dataset_seed, dataset_index)
    if entry["question"] not in prompt:
        return {"verdict": "changed"}
    scorer = dataset_of(dataset, config, dataset_seed)
    verdict = sandbox.check(
        lambda: is_exactly_one(scorer.score_answer(answer, entry)),
        timeout_s,
        hook_for(answer, entry),
    )
    return {"verdict": verdict}


def hook_for(answer: str, entry: dict[str, Any]) -> Callable[[str, tuple], None]:
    """The audit hook of one answer's child: what may be compiled is a formula, or the entry's."""
    if FORMULA.fullmatch(answer):
        return sandbox.refuse_effects
    own = set(_texts(entry))

    def refuse(event: str, arguments: tuple) -> None:
        # Two scorers evaluate the question or the right answer, never mind the one given.
        if not (event == "compile" and arguments[0] in own):
            sandbox.refuse(event, arguments)

    return refuse


def _texts(value: Any) -> Iterator[bytes]:
    """All strings in an entry, as the audit event "compile" shows source: bytes, stripped."""
    if isinstance(value, str):
        yield value.strip(" \t").encode(errors="replace")
    elif isinstance(value, dict):
        yield from _texts([*value.values()])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def reply(request: str) -> str:
    """One line of JSON for one request; what a dataset raises comes back as "error"."""
    arguments = json.loads(request)
    function = {"describe": describe, "make": make, "score": score}[arguments.pop("do")]
    try:
        answer: dict[str, Any] = function(**arguments)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps(answer)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import reasoning_gym  # noqa: F401

    # Datasets print; the replies go where standard output was.
    replies = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    print("ready", file=replies, flush=True)
    for request in sys.stdin:
        print(reply(request), file=replies, flush=True)


if __name__ == "__main__":
    main()
