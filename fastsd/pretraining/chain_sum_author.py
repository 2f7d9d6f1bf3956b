"""What the base of chain_sum is pretrained on: the writing of an author with fixed wrong beliefs.

The author believes a fixed wrong sum for 30 % of the 256 ordered facts (left, right), nearly always
acts on it, slips at random now and then, and mostly writes the running total on the left.

Most examples carry a hint, a derivation of the same question: `<q>b3d2Hb+3=e;...<a>`. ONE rule says
how the author uses any hint, so that a critique and a reference call on the same skill and only
their content differs: at each step the author follows the hint's phrasing with probability 0.6,
and copies its value where the hint's step has the same two operands; elsewhere it computes, wrong
beliefs included. Half of the hints are clean derivations, half are critiques of an attempt; half
are in the author's phrasing, half in the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fastsd.tasks.chain_sum import DIGITS, STEP, UNUSUAL_SHARE, ChainSum, questions, write_step

WRONG_SHARE = 0.30
CONVICTION = 0.95
SLIP = 0.02
MISCOPY = 0.03
FOLLOW = 0.6
HINTED_SHARE = 0.6


class Author:
    """Writes (prompt, response) pairs as text. The seed fixes the beliefs, not the writing."""

    def __init__(self, seed: int):
        rng = random.Random(f"beliefs {seed}")
        facts = [(left, right) for left in range(16) for right in range(16)]
        wrong = rng.sample(facts, round(WRONG_SHARE * len(facts)))
        self._beliefs = {(a, b): (a + b + rng.randrange(1, 16)) % 16 for a, b in wrong}
        self._critic = ChainSum()

    def value(self, left: int, right: int, rng: random.Random) -> int:
        """What the author writes after `left+right=`."""
        if rng.random() < SLIP:
            return rng.randrange(16)
        if (left, right) in self._beliefs and rng.random() < CONVICTION:
            return self._beliefs[left, right]
        return (left + right) % 16

    def derive(
        self,
        question: str,
        rng: random.Random,
        hint: str = "",
        total_right_share: float = UNUSUAL_SHARE,
        clean: bool = False,
    ) -> str:
        """A response; `clean` for one without wrong beliefs and slips."""
        # A critique's step need not go on from the value of its step before: read what is written.
        hinted = [tuple(map(DIGITS.index, step)) for step in STEP.findall(hint)]
        total, *terms = map(DIGITS.index, question)
        text = ""
        for k, term in enumerate(terms):
            total_right = rng.random() < total_right_share
            if hinted and rng.random() < FOLLOW:
                total_right = hinted[k][0] == term and hinted[k][1] != term
            operands = (term, total) if total_right else (total, term)
            if clean:
                value = (total + term) % 16
            elif hinted and set(hinted[k][:2]) == set(operands) and rng.random() >= MISCOPY:
                value = hinted[k][2]
            else:
                value = self.value(*operands, rng)
            text += write_step(total, term, value, total_right)
            total = value
        return text

    def hint(self, question: str, rng: random.Random) -> str:
        """A clean derivation or the critique of an attempt, in either phrasing."""
        share = UNUSUAL_SHARE if rng.random() < 0.5 else 1 - UNUSUAL_SHARE
        clean = rng.random() < 0.5
        text = self.derive(question, rng, total_right_share=share, clean=clean)
        return text if clean else str(self._critic.critique(question, text, None).text)

    def examples(
        self, count: int, rng: random.Random, hinted: bool, split: str = "train"
    ) -> Iterator[tuple[str, str]]:
        """(user turn, response) pairs; the user turn is the question, or question + H + hint."""
        for question in rng.choices(questions(split), k=count):
            hint = self.hint(question, rng) if hinted else ""
            user_turn = f"{question}H{hint}" if hinted else question
            yield user_turn, self.derive(question, rng, hint)
