"""Questions to train and evaluate on: procedural tasks, or rows of files (`data_files.py`).

Where training stands in its data is one number, the cursor: `take(cursor, count, seed)` is a pure
function, so a resumed run sees exactly the prompts that an uninterrupted one would have.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from fastsd.config.sections import DataConfig
from fastsd.data_files import DataError, read_prompts
from fastsd.types import Prompt, Task

# Far apart, and prime: seeds do not meet, nor start at the same question of a task that repeats.
_SEED_STRIDE = 10_000_019


class DataSource(Protocol):
    def take(self, cursor: int, count: int, seed: int) -> list[Prompt]:
        """Training prompts cursor ... cursor + count - 1 of an endless, fixed sequence."""
        ...


class TaskSource:
    """A procedural task's questions; different seeds see different ones."""

    def __init__(self, task: Task):
        self._task = task

    def take(self, cursor: int, count: int, seed: int) -> list[Prompt]:
        start = seed * _SEED_STRIDE + cursor
        return [self._task.prompt("train", index) for index in range(start, start + count)]


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

    def _order(self, seed: int, epoch: int) -> list[int]:
        key = (seed, epoch)
        if self._epoch is None or self._epoch[0] != key:
            order = list(range(len(self._prompts)))
            if self._shuffle:
                random.Random(f"{seed}/{epoch}").shuffle(order)
            self._epoch = (key, order)
        return self._epoch[1]


def load_data(
    config: DataConfig,
    task: Task | None,
    seed: int,
    needs: Mapping[str, str] = MappingProxyType({}),
) -> tuple[DataSource, Callable[[int], list[Prompt]]]:
    """The training source, and a function from n to the first n held-out prompts (fewer if fewer).

    Files where data.train and data.eval name them, else the task's questions. needs: fields
    (answer, solution) that no row may lack, with the reason; held-out rows need no solution.
    Raises DataError for a row, file or mapping that cannot be used, for a run without training or
    held-out questions, and for a seed that cannot choose questions (negative).
    """
    if seed < 0:
        raise DataError(f"seed = {seed}: it chooses the questions and must be 0 or more")
    train: DataSource
    if config.train:
        train = RowSource(read_prompts(config.train, config.columns, needs), config.shuffle)
    elif task:
        train = TaskSource(task)
    else:
        raise DataError("nothing to train on: set data.task or data.train")
    if config.eval:
        answer = {field: why for field, why in needs.items() if field == "answer"}
        held_out = read_prompts(config.eval, config.columns, answer)
        return train, lambda count: held_out[:count]
    if task:
        return train, lambda count: [task.prompt("eval", index) for index in range(count)]
    raise DataError("nothing to evaluate on: set data.eval to a file of held-out rows")


USAGE = """usage: python -m fastsd.data check FILE [field=column ...]
       python -m fastsd.data filter [CONFIG.toml ...] --out FILE [--section.key VALUE ...]

check: the count and the first row of a data file. filter: keeps the questions that are hard but
learnable; see python -m fastsd.data filter --help."""


def main(arguments: list[str]) -> int:
    """`python -m fastsd.data`; returns the exit code."""
    if arguments[:1] == ["filter"]:
        from fastsd.filter_command import main as filter_main

        return filter_main(arguments[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(arguments) < 2 or arguments[0] != "check":
        print(USAGE, file=sys.stderr)
        return 2
    columns = {field: column for field, _, column in (a.partition("=") for a in arguments[2:])}
    try:
        prompts = read_prompts(arguments[1], columns)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments[1]}: {len(prompts)} rows; the first:\n{prompts[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
