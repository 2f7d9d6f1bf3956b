"""Questions to train and evaluate on: procedural tasks, or rows of files (`files.py`).

Where training stands in its data is one number, the cursor: `take(cursor, count, seed)` is a pure
function, so a resumed run sees exactly the prompts that an uninterrupted one would have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from fastsd.conditions import CONDITIONS
from fastsd.config import Config
from fastsd.config.sections import DataConfig
from fastsd.prompts.files import DataError, read_prompts
from fastsd.types import Prompt, Task


def required_fields(config: Config) -> dict[str, str]:
    """Prompt fields that no training row may lack, each with the reason."""
    needs = {}
    if (field := CONDITIONS[config.condition].needs) is not None:
        needs[field] = f'condition = "{config.condition}" shows it to the teacher'
    if config.reward.function in ("exact", "math"):
        needs["answer"] = f'reward.function = "{config.reward.function}" compares with it'
    return needs


# Far apart, and prime: seeds do not meet, nor start at the same question of a task that repeats.
_SEED_STRIDE = 10_000_019


class DataSource(Protocol):
    def take(self, cursor: int, count: int, seed: int) -> list[Prompt]:
        """Training prompts cursor ... cursor + count - 1 of an endless, fixed sequence."""
        ...

    def first(self, count: int, seed: int) -> list[Prompt]:
        """The first `count` in the order in which they are written; fewer if there are fewer."""
        ...


class TaskSource:
    """A procedural task's questions; different seeds see different ones."""

    def __init__(self, task: Task):
        self._task = task

    def take(self, cursor: int, count: int, seed: int) -> list[Prompt]:
        start = seed * _SEED_STRIDE + cursor
        return [self._task.prompt("train", index) for index in range(start, start + count)]

    def first(self, count: int, seed: int) -> list[Prompt]:
        return self.take(0, count, seed)


class RowSource:
    """Rows in epochs: each epoch every row once, shuffled by (seed, epoch), or as in the file."""

    def __init__(self, prompts: list[Prompt], shuffle: bool):
        self._prompts = prompts
        self._shuffle = shuffle
        self._epoch: tuple[tuple[int, int], list[int]] | None = None

    def take(self, cursor: int, count: int, seed: int) -> list[Prompt]:
        size = len(self._prompts)
        places = [divmod(index, size) for index in range(cursor, cursor + count)]
        return [self._prompts[self._order(seed, epoch)[at]] for epoch, at in places]

    def first(self, count: int, seed: int) -> list[Prompt]:
        return self._prompts[:count]

    def _order(self, seed: int, epoch: int) -> list[int]:
        key = (seed, epoch)
        if self._epoch is None or self._epoch[0] != key:
            order = list(range(len(self._prompts)))
            if self._shuffle:
                random.Random(f"{seed}/{epoch}").shuffle(order)
            self._epoch = (key, order)
        return self._epoch[1]


def load_training(
    config: DataConfig,
    task: Task | None,
    seed: int,
    needs: Mapping[str, str] = MappingProxyType({}),
) -> DataSource:
    """The file that data.train names, else the task's questions.

    needs: fields (answer, solution) that no row may lack, with the reason. Raises DataError for a
    row, file or mapping that cannot be used, where there is neither file nor task, and for a seed
    that cannot choose questions (negative).
    """
    if seed < 0:
        raise DataError(f"seed = {seed}: it chooses the questions and must be 0 or more")
    if config.train:
        return RowSource(read_prompts(config.train, config.columns, needs), config.shuffle)
    if task:
        return TaskSource(task)
    raise DataError("nothing to train on: set data.task or data.train")


def load_held_out(
    config: DataConfig, task: Task | None, needs: Mapping[str, str] = MappingProxyType({})
) -> Callable[[int], list[Prompt]]:
    """A function from n to the first n held-out questions (fewer if there are fewer).

    Of the file that data.eval names, else of the task. needs: as in `load_training`, but held-out
    rows need no solution. Raises DataError.
    """
    if config.eval:
        answer = {field: why for field, why in needs.items() if field == "answer"}
        held_out = read_prompts(config.eval, config.columns, answer)
        return lambda count: held_out[:count]
    if task:
        return lambda count: [task.prompt("eval", index) for index in range(count)]
    raise DataError("nothing to evaluate on: set data.eval to a file of held-out rows")
