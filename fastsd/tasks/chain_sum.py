"""Chained sums modulo 16: the task of the embedded experiment.

A question is four distinct hexadecimal digits, a response their running total, a step per digit:

    b3d2  ->  b+3=e;e+d=b;b+2=d;

Each step reads `left+right=value;`. The solver writes the running total on the left (`e+d=b`, its
own phrasing) in nine steps of ten; a reference solution is somebody else's derivation and writes it
on the right (`d+e=b`) in nine of ten. That is what makes a reference disagree with the solver in
tokens that carry no error, and a critique, which rewrites the attempt itself, disagree only where
the attempt is wrong.

Everything works on strings, so any text at all can be judged: what cannot be read is a wrong step.
The questions are all 43,680 arrangements in an order fixed by a hash; one in ten is held out.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fastsd.tasks import TaskError
from fastsd.tasks.variants import Variants, check_place
from fastsd.types import Critique, Prompt, Step

DIGITS = "0123456789abcdef"
TERMS = 4
STEPS = TERMS - 1
# Of the steps of a derivation, how many are phrased the less usual way round for their author.
UNUSUAL_SHARE = 0.1

_QUESTION = re.compile(f"[{DIGITS}]{{{TERMS}}}")
STEP = re.compile(rf"([{DIGITS}])\+([{DIGITS}])=([{DIGITS}]);")
_RESPONSE = re.compile(rf"(?:{STEP.pattern}){{{STEPS}}}")


@dataclass(frozen=True)
class JudgedStep:
    """One step of an attempt, beside what it should have been.

    total, term: the running total that the attempt itself had reached, and the question's digit to
    be added. total_right: written `term+total=`. operands_ok, value_ok: the left side is those two,
    the value is their sum. [start, end): the step's span in the text.
    """

    start: int
    end: int
    total: int
    term: int
    total_right: bool
    operands_ok: bool
    value_ok: bool

    @property
    def correct(self) -> bool:
        return self.operands_ok and self.value_ok


def write_step(total: int, term: int, value: int, total_right: bool = False) -> str:
    """`total+term=value;`, or `term+total=value;` with total_right."""
    left, right = (term, total) if total_right else (total, term)
    return f"{DIGITS[left]}+{DIGITS[right]}={DIGITS[value]};"


def base_path() -> Path:
    """The folder of the shipped base checkpoint, for `from_pretrained`."""
    return Path(str(resources.files("fastsd.tasks") / "chain_sum_base"))


@functools.cache
def questions(split: str) -> tuple[str, ...]:
    """All questions of a split, in an order fixed by a hash. Every tenth hash is held out."""
    arrangements = ("".join(digits) for digits in itertools.permutations(DIGITS, TERMS))
    hashed = sorted((_hash(question), question) for question in arrangements)
    held_out = split == "eval"
    return tuple(question for number, question in hashed if (number % 10 == 0) == held_out)


def judge(question: str, response: str) -> Iterator[JudgedStep]:
    """Reads a response, step by step, on the attempt's own running total.

    A step ends with `;`. One that cannot be read is wrong, and leaves the total where it should be.
    Steps beyond the last term are not judged. Raises TaskError for a question of another task.
    """
    total, *terms = _terms(question)
    start = 0
    for term in terms:
        if start >= len(response):
            return
        end = response.find(";", start) + 1 or len(response)
        match = STEP.fullmatch(response, start, end)
        left, right, value = map(DIGITS.index, match.groups()) if match else (None, None, None)
        yield JudgedStep(
            start,
            end,
            total,
            term,
            total_right=left == term and left != total,
            operands_ok=(left, right) in ((total, term), (term, total)),
            value_ok=value == (total + term) % 16,
        )
        total = (total + term) % 16 if value is None else value
        start = end


class ChainSum(Variants):
    """`fastsd.types.Task`, in variants: see `Variants`."""

    name = "chain_sum"

    def prompt(self, split: str, index: int) -> Prompt:
        """The index-th question; beyond the last one of the split they come round again."""
        check_place(split, index)
        pool = questions(split)
        question = pool[index % len(pool)]
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            messages=({"role": "user", "content": question},),
            answer=DIGITS[sum(_terms(question)) % 16],
            solution=self.reference(question),
        )

    def reference(self, question: str) -> str:
        """A correct derivation. The question alone decides which steps are phrased unusually."""
        total, *terms = _terms(question)
        text = ""
        for k, term in enumerate(terms):
            unusual = _hash(f"{question}/{k}") < UNUSUAL_SHARE * 2**64
            value = (total + term) % 16
            total_right = unusual != (self.reference_phrasing == "other")
            text += write_step(total, term, value, total_right)
            total = value
        return text

    def reward(self, prompts: list, completions: list, **columns: list) -> list[float | None]:
        """1.0 for the right total after steps of the right form, else 0.0, one per completion.

        TRL's signature: `prompts` and `completions` are lists of chat messages, or of strings.
        The final answer decides, as in any outcome reward: the steps before it are not checked.
        """
        pairs = zip(prompts, completions, strict=True)
        return [float(self._is_right(_last_text(p), _last_text(c))) for p, c in pairs]

    def _is_right(self, question: str, response: str) -> bool:
        answer = DIGITS[sum(_terms(question)) % 16]
        match = _RESPONSE.fullmatch(response)
        return match is not None and response[-2] == answer

    def answer(self, response: str) -> str | None:
        """The last step's value; None where the response has not the right form."""
        return response[-2] if _RESPONSE.fullmatch(response) else None

    def steps(self, question: str, response: str) -> list[Step]:
        """The response's steps, right or wrong; text after the last step belongs to none."""
        return [Step(step.start, step.end, step.correct) for step in judge(question, response)]

    def critique(self, question: str, trace: str, reference: str | None) -> Critique:
        """The attempt, step by step and in its own phrasing, with left sides and values put right.

        Steps that the attempt lacks go on from the corrected total. first_error is the index of the
        first step that is wrong or missing. The reference is not needed and not looked at.
        """
        judged = list(judge(question, trace))
        total, *terms = _terms(question)
        text, first_error = "", None
        for k, term in enumerate(terms):
            step = judged[k] if k < len(judged) else None
            if step is not None and self.critic_variant == "local":
                total = step.total
            if first_error is None and (step is None or not step.correct):
                first_error = k
            value = (total + term) % 16
            text += write_step(total, term, value, step is not None and step.total_right)
            total = value
        return Critique(text, first_error)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _terms(question: str) -> list[int]:
    if not isinstance(question, str) or not _QUESTION.fullmatch(question):
        shown = repr(question)[:60]
        raise TaskError(f"chain_sum: a question is {TERMS} hexadecimal digits, not {shown}")
    return [DIGITS.index(digit) for digit in question]


def _last_text(messages: object) -> str:
    """The text of a completion or prompt in either of TRL's formats; other content is no text."""
    if isinstance(messages, (list, tuple)):
        messages = messages[-1].get("content") if messages else ""
    return messages if isinstance(messages, str) else ""
