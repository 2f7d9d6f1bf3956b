"""Prompts and responses to token trees, and token trees to micro-batches.

    student   [ Q | R_1 ... R_G ]
    teacher   [ Q F | R_1 ... R_G ]             reference: one feedback text for the group
              [ Q | F_1 R_1 | ... | F_G R_G ]   critique: one feedback text per response

The prefix of a teacher's tree is the longest common token prefix of its group's prompts, so both
forms come from one rule. Response ids are spliced as they were sampled, never re-tokenised.

A micro-batch is what one budget of tokens holds: whole groups, or one group too big for it, whose
prefixes go through the network first and whose branches follow in parts (`deferred.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastsd.types import Branch, Sample, TokenTree, common_prefix


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


@dataclass(frozen=True)
class MicroBatch:
    """Samples whose gradients are formed together.

    parts: what goes through the network at once. deferred: the parts are one group's, and read the
    prefixes that went through before them; otherwise there is one part, of whole groups.
    """

    parts: tuple[tuple[Sample, ...], ...]
    deferred: bool = False

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample for part in self.parts for sample in part)


def micro_batches(
    samples: Sequence[Sample], token_budget: int, defers: bool = True
) -> list[MicroBatch]:
    """Splits samples so that a pass, the student's or the teacher's, has few enough packed tokens.

    A pass has at most `token_budget` tokens, except that a prefix and a single branch are never
    split. The teacher's are counted in full, also what a live teacher reads of the student's.
    Groups stay together where they fit, first fit decreasing, each micro-batch in the samples'
    order; those that do not fit come first, then the fullest, so that memory that does not suffice
    shows at once. Without `defers` a group's parts are micro-batches, each with its prefix.
    """
    groups = _groups(samples)
    counts = [_pass_tokens(group) for group in groups]
    totals = [_total([prefix, *branches]) for prefix, branches in counts]
    whole = [i for i, total in enumerate(totals) if max(total) <= token_budget]
    split = [i for i, total in enumerate(totals) if max(total) > token_budget]
    batches = []
    for i in sorted(split, key=lambda i: -max(totals[i])):
        # A part computes the prefix's last token again, for its hidden state.
        start = PassTokens(1, 1) if defers else counts[i][0]
        parts = _first_fit(counts[i][1], token_budget, start=start)
        chosen = tuple(tuple(groups[i][j] for j in part) for part in parts)
        batches += [MicroBatch(chosen, True)] if defers else [MicroBatch((p,)) for p in chosen]
    for together in _first_fit([totals[i] for i in whole], token_budget, start=PassTokens(0, 0)):
        batches.append(MicroBatch((tuple(s for j in together for s in groups[whole[j]]),)))
    return batches


def micro_batches_by_rank(
    samples: Sequence[Sample], token_budget: int, ranks: int
) -> list[list[MicroBatch]]:
    """Each rank's micro-batches, so that the ranks finish together: whole groups, the longest
    first, each to the rank that has least to do.

    All ranks make the same passes, for they are collective: as many micro-batches, and in the k-th
    of each a teacher's pass where one rank has it. `_padding` stands where there is nothing to do.
    """
    groups = _groups(samples)
    # Forward and backward, which is twice a forward; the teacher's forward.
    costs = [3 * total.student + total.teacher for total in map(_group_tokens, groups)]
    loads, shares = [0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(groups)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        loads[rank] += costs[i]
        shares[rank].append(i)
    by_rank = []
    for share in shares:
        chosen = [sample for i in sorted(share) for sample in groups[i]]
        by_rank.append(micro_batches(chosen, token_budget, defers=False))
    # Most micro-batches teach or none does; these first, so that little padding is needed.
    by_rank = [sorted(batches, key=lambda batch: not _teaches(batch)) for batches in by_rank]
    return _padded(by_rank)


def _padded(by_rank: Sequence[Sequence[MicroBatch]]) -> list[list[MicroBatch]]:
    padded: list[list[MicroBatch]] = [[] for _ in by_rank]
    for k in range(max(map(len, by_rank))):
        present = [batches[k] for batches in by_rank if k < len(batches)]
        like = next((s for b in present for s in b.samples if s.teacher_ids is not None), None)
        padding = _padding(like or present[0].samples[0])
        for batches, filled in zip(by_rank, padded, strict=True):
            batch = batches[k] if k < len(batches) else MicroBatch(((),))
            if not batch.samples or (like is not None and not _teaches(batch)):
                batch = MicroBatch(((*batch.samples, padding),))
            filled.append(batch)
    return padded


def _padding(sample: Sample) -> Sample:
    """A few tokens of a sample that count for nothing, as a group of their own."""
    rollout = sample.rollout
    ids, logprobs = rollout.response_ids[:1], rollout.logprobs[:1]
    prompt = replace(rollout.prompt, id="padding\0")
    taught = None if sample.teacher_ids is None else sample.teacher_ids[:2]
    return Sample(
        replace(rollout, prompt=prompt, response_ids=ids, logprobs=logprobs),
        sample.student_ids[:2],
        taught,
        advantage=0.0,
        dropped=True,
    )


def _teaches(batch: MicroBatch) -> bool:
    return any(sample.teacher_ids is not None for sample in batch.samples)


class PassTokens(NamedTuple):
    """Packed tokens of the student's pass and of the teacher's."""

    student: int
    teacher: int


def _pass_tokens(group: Sequence[Sample]) -> tuple[PassTokens, list[PassTokens]]:
    """What a group's prefixes and each of its branches put into a pack."""
    prompts = [sample.teacher_ids for sample in group if sample.teacher_ids is not None]
    shared = len(common_prefix(prompts)) if prompts else 0
    branches = []
    for sample in group:
        fed = len(sample.rollout.response_ids) - 1
        taught = 0 if sample.teacher_ids is None else len(sample.teacher_ids) - shared + fed
        branches.append(PassTokens(fed, taught))
    return PassTokens(len(group[0].student_ids), shared), branches


def _group_tokens(group: Sequence[Sample]) -> PassTokens:
    prefix, branches = _pass_tokens(group)
    return _total([prefix, *branches])


def _total(counts: Sequence[PassTokens]) -> PassTokens:
    return PassTokens(sum(c.student for c in counts), sum(c.teacher for c in counts))


def _first_fit(counts: Sequence[PassTokens], budget: int, start: PassTokens) -> list[list[int]]:
    """Indices in bins that start with `start` tokens: first fit decreasing, fullest bin first."""
    bins: list[list[int]] = []
    used: list[PassTokens] = []
    for index in sorted(range(len(counts)), key=lambda index: -max(counts[index])):
        together = [_total([have, counts[index]]) for have in used]
        place = next((i for i, total in enumerate(together) if max(total) <= budget), len(bins))
        if place == len(bins):
            bins.append([])
            used.append(start)
        bins[place].append(index)
        used[place] = _total([used[place], counts[index]])
    fullest = sorted(range(len(bins)), key=lambda i: -max(used[i]))
    return [sorted(bins[i]) for i in fullest]


def _groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: list[list[Sample]] = []
    for sample in samples:
        if groups and groups[-1][0].group == sample.group:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups
