"""Whom the warm-up of word_problems imitates: an author with wrong beliefs about single facts.

A pretrained model knows how to add, so a habit to unlearn has to be taught. One global habit
(forgetting every carry) flips globally after a few updates and says nothing about alignment of
feedback. So the author believes a fixed wrong last digit for some of the 55 sums of two digits ("a
7 and a 5 end in 4"), and nearly always acts on it: each error is one digit of one step. The digit
is too high by one to three, so that two errors practically never cancel in the answer.

Two examples of five carry a hint. ONE rule says how any hint is used, so that a reference and a
critique call on the same skill and only their content differs: at each step the author follows the
hint's phrasing with probability 0.6, and copies its value where the hint's step adds the same two
numbers; elsewhere he computes, wrong beliefs included. Half of the hints are clean derivations,
half are corrected attempts of his own; half are in his phrasing, half in the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastsd.tasks.word_problems import (
    UNUSUAL_SHARE,
    Addition,
    WordProblems,
    as_text,
    derivation,
    numbers_of,
    write_response,
)
from fastsd.types import Prompt

WRONG_SHARE = 0.45
CONVICTION = 0.95
COPY = 0.97
FOLLOW = 0.6
HINTED_SHARE = 0.4


@dataclass(frozen=True)
class Example:
    """One supervised example: a training question, what the hint says (if any), his response."""

    prompt: Prompt
    hint: str | None
    response: str


class Author:
    """The seed fixes the beliefs, not the writing. beliefs: unordered digit pair -> last digit."""

    def __init__(self, seed: int = 0):
        rng = random.Random(f"word_problems/beliefs/{seed}")
        pairs = [(low, high) for low in range(10) for high in range(low, 10)]
        wrong = rng.sample(pairs, round(WRONG_SHARE * len(pairs)))
        self.beliefs = {pair: (sum(pair) + rng.choice((1, 2, 3))) % 10 for pair in wrong}

    def believes(self, total: int, addend: int) -> int:
        """The value he holds for total+addend: right but for its last digit."""
        value = total + addend
        low, high = sorted((total % 10, addend % 10))
        return value - value % 10 + self.beliefs.get((low, high), value % 10)

    def convinced(self, numbers: Sequence[int]) -> list[Addition]:
        """His steps without chance: his own phrasing, and every belief acted on."""
        total, steps = numbers[0], []
        for addend in numbers[1:]:
            steps.append(Addition(total, addend, self.believes(total, addend)))
            total = steps[-1].value
        return steps

    def derive(
        self,
        numbers: Sequence[int],
        rng: random.Random,
        swap_rate: float = UNUSUAL_SHARE,
        hint: Sequence[Addition] | None = None,
    ) -> list[Addition]:
        """His steps for the numbers, each written `addend+total` with probability swap_rate."""
        total, steps = numbers[0], []
        for k, addend in enumerate(numbers[1:]):
            swapped = rng.random() < swap_rate
            if hint is not None and rng.random() < FOLLOW:
                swapped = hint[k].swapped
            value = total + addend
            if rng.random() < CONVICTION:
                value = self.believes(total, addend)
            if hint is not None and hint[k].operands == {total, addend} and rng.random() < COPY:
                value = hint[k].value
            steps.append(Addition(total, addend, value, swapped))
            total = value
        return steps

    def hint(self, numbers: Sequence[int], rng: random.Random) -> list[Addition]:
        """A clean derivation or an attempt of his with each step corrected, in either phrasing."""
        swap_rate = rng.choice((UNUSUAL_SHARE, 1 - UNUSUAL_SHARE))
        if rng.random() < 0.5:
            return derivation(numbers, rng, swap_rate)
        return [step.corrected() for step in self.derive(numbers, rng, swap_rate)]

    def examples(self, seed: int = 0) -> Iterator[Example]:
        """Unending supervised examples on training questions."""
        task = WordProblems()
        rng = random.Random(f"word_problems/examples/{seed}")
        while True:
            prompt = task.prompt("train", rng.randrange(2**31))
            numbers = numbers_of(prompt.question)
            hint = self.hint(numbers, rng) if rng.random() < HINTED_SHARE else None
            steps = self.derive(numbers, rng, hint=hint)
            yield Example(prompt, None if hint is None else as_text(hint), write_response(steps))
