"""Procedural tasks with checkable steps, by name. Add a task here.

In: a name and options. Out: `load_task`: a `fastsd.types.Task` makes questions, checks answers,
judges steps and writes rule-based critiques. Tasks are imported only when asked for, so that naming
one costs nothing. Other rooms also use `answers` and `steps` (how any response is read), and
the bases made for them `chain_sum` and `word_problems`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable

from fastsd.errors import FastsdError
from fastsd.types import Task

TASKS = {
    "chain_sum": ("fastsd.tasks.chain_sum", "ChainSum"),
    "word_problems": ("fastsd.tasks.word_problems", "WordProblems"),
    "reasoning_gym": ("fastsd.tasks.gym", "ReasoningGym"),
}


class TaskError(FastsdError):
    """An unknown task or task option, or input that does not belong to the task."""


def load_task(name: str, **options: object) -> Task:
    """The task called `name`, with its options: load_task("chain_sum", critic_variant="local").

    Raises TaskError for a name or an option that does not exist, or a bad value.
    """
    if name not in TASKS:
        raise TaskError(f"data.task: no task {name!r}; {did_you_mean(name, TASKS)}")
    module, attribute = TASKS[name]
    constructor = getattr(importlib.import_module(module), attribute)
    known = inspect.signature(constructor).parameters
    for option in options:
        if option not in known:
            raise TaskError(f"task {name}: no option {option!r}; {did_you_mean(option, known)}")
    return constructor(**options)


def choose(field: str, value: object, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`; else a TaskError that names the field."""
    if value not in choices:
        raise TaskError(f"{field}: {value!r} is not one of {', '.join(choices)}")
    return str(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause for an error message: the nearest of the known words, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(known) or 'none'}"
