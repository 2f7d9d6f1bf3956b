"""Token trees and micro-batches: nothing lost, nothing reordered, responses spliced as sampled."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.model.micro_batches import MicroBatch, micro_batches, student_trees, teacher_trees
from fastsd.model.packing import PrefixKeys, count_tokens
from fastsd.types import Prompt, Rollout, Sample, common_prefix


def sample(prompt_id, student, teacher, response):
    prompt = Prompt(prompt_id, ({"role": "user", "content": "q"},))
    rollout = Rollout(prompt, 0, tuple(response), (0.0,) * len(response), "", False)
    return Sample(rollout, tuple(student), None if teacher is None else tuple(teacher), 0.0)


def unrolled(trees):
    return [(*t.prefix_ids, *b.context_ids, *b.response_ids) for t in trees for b in t.branches]


def test_reference_shares_the_whole_teacher_prompt():
    group = [sample("a", [1, 2], [1, 2, 8, 9], [5]), sample("a", [1, 2], [1, 2, 8, 9], [6, 7])]
    [tree] = teacher_trees(group)
    assert tree.prefix_ids == (1, 2, 8, 9)
    assert [b.context_ids for b in tree.branches] == [(), ()]
    assert sum(len(branch.response_ids) for branch in tree.branches) == 3


def test_critique_shares_the_question_only():
    group = [sample("a", [1, 2], [1, 2, 8], [5]), sample("a", [1, 2], [1, 2, 9, 9], [6])]
    [tree] = teacher_trees(group)
    assert tree.prefix_ids == (1, 2)
    assert [b.context_ids for b in tree.branches] == [(8,), (9, 9)]


ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)
contexts = st.none() | ids
groups = st.lists(
    st.tuples(ids, st.lists(st.tuples(contexts, ids), min_size=1, max_size=4)), max_size=5
)


def samples_of(drawn):
    return [
        sample(str(g), student, None if context is None else [*student, *context], response)
        for g, (student, branches) in enumerate(drawn)
        for context, response in branches
    ]


def passes(batch):
    """(tokens, branches) of every forward pass over parts, by role, as the packs count them."""
    for part in batch.parts:
        taught = [s for s in part if s.teacher_ids is not None]
        shared = [s for s in batch.samples if s.teacher_ids is not None] if batch.deferred else []
        known = [None, None]
        if batch.deferred:
            prefix = teacher_trees(shared)[0].prefix_ids[:-1] if shared else ()
            known = [PrefixKeys([batch.samples[0].student_ids[:-1]]), PrefixKeys([prefix])]
        yield count_tokens(student_trees(part), known[0]).computed, len(part)
        yield count_tokens(teacher_trees(taught), known[1]).computed, len(taught)


@settings(max_examples=300, deadline=None)
@given(groups, st.integers(1, 60))
def test_micro_batches_keep_every_sample_within_the_budget(drawn, budget):
    samples = samples_of(drawn)
    rows = [s for s in samples if s.teacher_ids is not None]
    assert unrolled(student_trees(samples)) == [
        (*s.student_ids, *s.rollout.response_ids) for s in samples
    ]
    assert unrolled(teacher_trees(rows)) == [
        (*s.teacher_ids, *s.rollout.response_ids) for s in rows
    ]
    batches = micro_batches(samples, budget)
    assert batches == micro_batches(samples, budget)
    found = [id(s) for batch in batches for s in batch.samples]
    assert sorted(found) == sorted(map(id, samples))
    place = {id(s): i for i, s in enumerate(samples)}
    for batch in batches:
        assert batch.parts and all(batch.parts)
        for part in batch.parts:
            assert [place[id(s)] for s in part] == sorted(place[id(s)] for s in part)
        for tokens, branches in passes(batch):
            assert tokens <= budget or (batch.deferred and branches == 1)


@settings(max_examples=300, deadline=None)
@given(groups, st.integers(1, 60))
def test_groups_go_in_parts_only_where_they_do_not_fit(drawn, budget):
    samples = samples_of(drawn)
    batches = micro_batches(samples, budget)
    sizes = [sum(s.group == name for s in samples) for name in {s.group for s in samples}]
    in_batches = [
        [sum(s.group == name for s in batch.samples) for name in {s.group for s in batch.samples}]
        for batch in batches
    ]
    assert sorted(n for counts in in_batches for n in counts) == sorted(sizes)
    for batch in batches:
        if batch.deferred:
            whole = max(tokens for tokens, _ in passes(MicroBatch((batch.samples,))))
            assert len({s.group for s in batch.samples}) == 1 and whole > budget
        else:
            assert len(batch.parts) == 1


def test_micro_batches_by_hand():
    # 4 tokens of prompt with feedback, and one of each response but its last: 5, 6, ... tokens.
    def samples(*lengths):
        return [sample(name, [1], [1, 2, 3, 4], [5] * length) for name, length in lengths]

    def sizes(batches):
        return [[len(s.rollout.response_ids) for s in batch.samples] for batch in batches]

    drawn = samples(("a", 2), ("b", 9), ("c", 3), ("d", 5), ("e", 7))
    assert sizes(micro_batches(drawn, 1000)) == [[2, 9, 3, 5, 7]]
    # 12 and 6, 10 and 8, and 5.
    assert sizes(micro_batches(drawn, 18)) == [[9, 3], [5, 7], [2]]
    # The fullest first, though it began with a shorter one.
    assert sizes(micro_batches(samples(("a", 3), ("b", 2), ("c", 2)), 10)) == [[2, 2], [3]]
    # 12 and 10 are too long: the longest first, each alone after its prompt.
    batches = micro_batches(drawn[::-1], 8)
    assert sizes(batches) == [[9], [7], [5], [3], [2]]
    assert [batch.deferred for batch in batches] == [True, True, False, False, False]
    # A group of 4 + (1 + 8 + 2 + 4) tokens in parts of at most 9, a token of the prompt in each.
    group = samples(("a", 2), ("a", 9), ("a", 3), ("a", 5))
    [batch] = micro_batches(group, 9)
    assert [[len(s.rollout.response_ids) for s in part] for part in batch.parts] == [[9], [2, 3, 5]]
    assert not micro_batches(group, 19)[0].deferred and micro_batches(group, 18)[0].deferred


@given(st.lists(ids.map(tuple), min_size=1, max_size=5))
def test_common_prefix_is_the_longest(sequences):
    prefix = common_prefix(sequences)
    assert all(s[: len(prefix)] == prefix for s in sequences)
    longer = {s[: len(prefix) + 1] for s in sequences}
    assert len(longer) > 1 or min(map(len, sequences)) == len(prefix)
