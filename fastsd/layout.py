"""Prompts and responses to token trees, and token trees to micro-batches.

    student   [ Q | R_1 ... R_G ]
    teacher   [ Q F | R_1 ... R_G ]             reference: one feedback text for the group
              [ Q | F_1 R_1 | ... | F_G R_G ]   critique: one feedback text per response

The prefix of a teacher's tree is the longest common token prefix of its group's prompts, so both
forms come from one rule. Response ids are spliced as they were sampled, never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastsd.types import Branch, Rollout, TokenTree


@dataclass(frozen=True)
class Sample:
    """One rollout with everything the loss needs of it.

    student_ids: the prompt. teacher_ids: the prompt with feedback, None without a teacher.
    advantage: GRPO's group-normalised reward; 0 where there is no signal. feedback: the text the
    teacher is shown; feedback_cut: it was shortened to fit.
    """

    rollout: Rollout
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...] | None
    advantage: float
    feedback: str | None = None
    feedback_cut: bool = False

    @property
    def group(self) -> str:
        return self.rollout.prompt.id


def student_trees(samples: Sequence[Sample]) -> list[TokenTree]:
    """One tree per group of consecutive samples with the same prompt, in the samples' order."""
    return [
        TokenTree(group[0].student_ids, tuple(Branch((), s.rollout.response_ids) for s in group))
        for group in _groups(samples)
    ]


def teacher_trees(samples: Sequence[Sample]) -> list[TokenTree]:
    """The same for the self-teacher. Every sample must have teacher_ids."""
    trees = []
    for group in _groups(samples):
        prompts = [sample.teacher_ids or () for sample in group]
        prefix = common_prefix(prompts)
        branches = tuple(
            Branch(prompt[len(prefix) :], sample.rollout.response_ids)
            for prompt, sample in zip(prompts, group, strict=True)
        )
        trees.append(TokenTree(prefix, branches))
    return trees


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest common prefix of the sequences."""
    shortest, longest = min(sequences), max(sequences)
    length = next(
        (i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b),
        min(len(shortest), len(longest)),
    )
    return shortest[:length]


def micro_batches(samples: Sequence[Sample], token_budget: int) -> list[list[Sample]]:
    """Splits samples, in order, so that one student pass holds at most `token_budget` tokens.

    Groups stay together where they fit; a single sample is never split, whatever its length.
    """
    batches: list[list[Sample]] = []
    used = 0
    for group in _groups(samples):
        costs = [len(s.rollout.response_ids) + len(s.teacher_ids or s.student_ids) for s in group]
        fits_alone = sum(costs) <= token_budget
        for index, (sample, cost) in enumerate(zip(group, costs, strict=True)):
            # A group that fits alone starts a batch of its own rather than being split.
            needed = sum(costs) if fits_alone and index == 0 else cost
            if not batches or used + needed > token_budget:
                batches.append([])
                used = 0
            batches[-1].append(sample)
            used += cost
    return batches


def _groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: list[list[Sample]] = []
    for sample in samples:
        if groups and groups[-1][0].group == sample.group:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups
