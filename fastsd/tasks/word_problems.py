"""Addition word problems solved in written steps, for a real pretrained model.

    Tom has 12 apples, finds 7 and buys 25. How many apples now?
    12+7=19
    19+25=44
    Answer: 44

A step is `total+addend=value`. The solver writes the running total first (its own phrasing) in nine
steps of ten; a reference is somebody else's derivation and writes the addend first in nine of ten.
The critic is a rule: each step of the attempt, verbatim where right, its left side repaired and its
value corrected where wrong. `fastsd.pretraining.word_author` makes a model that has something to
learn.

Everything is read back from the text of the question and the response alone; text that cannot be
read is a wrong step, never an error.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastsd.tasks import TaskError
from fastsd.tasks.variants import Variants, check_place
from fastsd.types import Critique, Prompt, Step

SYSTEM = "Add step by step."
# `prompt.reference_template` and `prompt.critique_template` of a run on this task must be this.
HINT_TEMPLATE = "{question}\nHint:\n{feedback}"

_NAMES = ("Tom", "Ana", "Ben", "Mia", "Sam", "Eva", "Max", "Zoe")
_THINGS = ("apples", "cards", "shells", "coins", "stamps", "pens", "books", "cups")
_QUESTIONS = (
    "{name} has {a} {things}, finds {b} and buys {c}. How many now?",
    "{name} counts {a} {things}, then {b} and then {c}. How many in all?",
    "Three boxes hold {a}, {b} and {c} {things}. How many in all?",
    "{name} gets {a} {things} on Monday, {b} on Tuesday and {c} on Friday. How many?",
)
_SMALLEST, _LARGEST = 3, 29
# Of the steps of a derivation, how many are phrased the less usual way round for their author.
UNUSUAL_SHARE = 0.1

# Digits are bounded: int() of thousands of digits is slow, and beyond 4,300 an error.
_NUMBER = re.compile(r"[0-9]{1,6}")
_ADDITION = re.compile(r"([0-9]{1,6})\+([0-9]{1,6})=([0-9]{1,6})")
_ANSWER = re.compile(r"Answer: ([0-9]{1,6})")
_LINE = re.compile(r"[^\n]+\n?")


@dataclass(frozen=True)
class Addition:
    """One step: running total, addend, value as written; swapped: `addend+total`."""

    total: int
    addend: int
    value: int
    swapped: bool = False

    def __str__(self) -> str:
        left = (self.addend, self.total) if self.swapped else (self.total, self.addend)
        return f"{left[0]}+{left[1]}={self.value}"

    @property
    def right(self) -> bool:
        return self.value == self.total + self.addend

    @property
    def operands(self) -> frozenset[int]:
        return frozenset((self.total, self.addend))

    def corrected(self) -> Addition:
        return replace(self, value=self.total + self.addend)


@dataclass(frozen=True)
class Attempt:
    """A response read as steps: one addition per addend, repaired where it cannot be read.

    valid: the left side was {running total, next number}. answer: the last line's number.
    """

    additions: tuple[Addition, ...]
    valid: tuple[bool, ...]
    answer: int | None

    @property
    def first_error(self) -> int | None:
        """Index of the first wrong step; the answer line counts as the last step."""
        for k, (addition, valid) in enumerate(zip(self.additions, self.valid, strict=True)):
            if not (valid and addition.right):
                return k
        copied = self.answer == self.additions[-1].value
        return None if copied else len(self.additions)


def numbers_of(question: str) -> list[int]:
    """The numbers of a question in order. Raises TaskError if there are fewer than two."""
    numbers = [int(digits) for digits in _NUMBER.findall(question)]
    if len(numbers) < 2:
        raise TaskError(
            f"word_problems: a question holds two numbers or more, not {len(numbers)} as in "
            f"{question[:60]!r}: use this task's reward and critic with its own questions only"
        )
    return numbers


def read_attempt(question: str, response: str) -> Attempt:
    """Read any text as an attempt. The total of a step is the value written in the one before."""
    total, *addends = numbers_of(question)
    lines = [match.group().rstrip("\n") for match in _LINE.finditer(response)]
    additions, valid = [], []
    for k, addend in enumerate(addends):
        match = _ADDITION.fullmatch(lines[k]) if k < len(lines) else None
        left = [int(match[1]), int(match[2])] if match else []
        readable = left in ([total, addend], [addend, total])
        addition = Addition(total, addend, int(match[3]) if match else total + addend)
        additions.append(replace(addition, swapped=readable and left != [total, addend]))
        valid.append(readable)
        total = additions[-1].value
    match = _ANSWER.fullmatch(lines[-1]) if len(lines) == len(addends) + 1 else None
    return Attempt(tuple(additions), tuple(valid), int(match[1]) if match else None)


def continued(additions: Sequence[Addition]) -> list[Addition]:
    """The same additions, each one going on from the corrected total of the one before."""
    total, out = additions[0].total, []
    for addition in additions:
        out.append(replace(addition, total=total).corrected())
        total = out[-1].value
    return out


def derivation(numbers: Sequence[int], rng: random.Random, swap_rate: float) -> list[Addition]:
    """A correct derivation; each step is written `addend+total` with probability swap_rate."""
    total, steps = numbers[0], []
    for addend in numbers[1:]:
        steps.append(Addition(total, addend, total + addend, rng.random() < swap_rate))
        total += addend
    return steps


def as_text(additions: Sequence[Addition]) -> str:
    return "\n".join(map(str, additions))


def write_response(additions: Sequence[Addition]) -> str:
    return f"{as_text(additions)}\nAnswer: {additions[-1].value}"


class WordProblems(Variants):
    """`fastsd.types.Task`, in variants: see `Variants`."""

    name = "word_problems"

    def prompt(self, split: str, index: int) -> Prompt:
        """Question `index` of "train" or "eval": the splits share no triple of numbers."""
        check_place(split, index)
        rng = random.Random(f"{self.name}/{split}/{index}")
        numbers = _draw_numbers(rng, split)
        wording = {"name": rng.choice(_NAMES), "things": rng.choice(_THINGS)}
        question = rng.choice(_QUESTIONS).format(
            **wording, **dict(zip("abc", numbers, strict=True))
        )
        swap_rate = UNUSUAL_SHARE if self.reference_phrasing == "own" else 1 - UNUSUAL_SHARE
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            messages=({"role": "system", "content": SYSTEM}, {"role": "user", "content": question}),
            answer=str(sum(numbers)),
            solution=as_text(derivation(numbers, rng, swap_rate)),
        )

    def reward(self, prompts: list, completions: list, **columns: list) -> list[float | None]:
        """1.0 for as many lines as a solution has, the last one `Answer: <the sum>`; else 0.0.

        TRL's signature: `prompts` and `completions` are lists of chat messages, or of strings.
        The final answer decides, as in any outcome reward: the steps before it are not checked.
        """
        pairs = [(_last_text(p), _last_text(c)) for p, c in zip(prompts, completions, strict=True)]
        return [float(read_attempt(q, r).answer == sum(numbers_of(q))) for q, r in pairs]

    def critique(self, question: str, trace: str, reference: str | None) -> Critique:
        """The attempt, step by step and in its own phrasing, with left sides and values put right.

        Steps that the attempt lacks are added. first_error is the index of the first step that is
        wrong or missing. The reference is not needed and not looked at.
        """
        attempt = read_attempt(question, trace)
        if self.critic_variant == "continued":
            judged = continued(attempt.additions)
        else:
            judged = [addition.corrected() for addition in attempt.additions]
        return Critique(as_text(judged), attempt.first_error)

    def answer(self, response: str) -> str | None:
        """The number of the last line `Answer: v`; None where there is none."""
        match = _ANSWER.fullmatch(response.rstrip("\n").rpartition("\n")[2])
        return match[1] if match else None

    def steps(self, question: str, response: str) -> list[Step]:
        """Every non-blank line as a step; its span keeps its newline. A line is right if it is the
        expected addition with the right value, or the answer line repeating the last value."""
        attempt = read_attempt(question, response)
        right = [a.right and v for a, v in zip(attempt.additions, attempt.valid, strict=True)]
        right.append(attempt.answer == attempt.additions[-1].value)
        return [
            Step(match.start(), match.end(), k < len(right) and right[k])
            for k, match in enumerate(_LINE.finditer(response))
        ]


def _draw_numbers(rng: random.Random, split: str) -> list[int]:
    """Three numbers of this split: a tenth of all triples, chosen by hash, is held out."""
    while True:
        numbers = [rng.randint(_SMALLEST, _LARGEST) for _ in range(3)]
        held_out = hashlib.sha256(repr(numbers).encode()).digest()[0] % 10 == 0
        if held_out == (split == "eval"):
            return numbers


def _last_text(messages: object) -> str:
    """The text of a completion or prompt in either of TRL's formats; other content is no text."""
    if isinstance(messages, (list, tuple)):
        messages = messages[-1].get("content") if messages else ""
    return messages if isinstance(messages, str) else ""
