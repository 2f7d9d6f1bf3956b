"""Token trees and micro-batches: nothing lost, nothing reordered, responses spliced as sampled."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.layout import Sample, common_prefix, micro_batches, student_trees, teacher_trees
from fastsd.types import Prompt, Rollout


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
    assert tree.response_tokens == 3


def test_critique_shares_the_question_only():
    group = [sample("a", [1, 2], [1, 2, 8], [5]), sample("a", [1, 2], [1, 2, 9, 9], [6])]
    [tree] = teacher_trees(group)
    assert tree.prefix_ids == (1, 2)
    assert [b.context_ids for b in tree.branches] == [(8,), (9, 9)]


ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)
groups = st.lists(st.tuples(ids, st.lists(st.tuples(ids, ids), min_size=1, max_size=4)), max_size=5)


@settings(max_examples=300, deadline=None)
@given(groups, st.integers(1, 60))
def test_trees_and_micro_batches_keep_every_sample_in_order(drawn, budget):
    samples = [
        sample(str(g), student, [*student, *context], response)
        for g, (student, branches) in enumerate(drawn)
        for context, response in branches
    ]
    want = [(*s.student_ids, *s.rollout.response_ids) for s in samples]
    assert unrolled(student_trees(samples)) == want
    assert unrolled(teacher_trees(samples)) == [
        (*s.teacher_ids, *s.rollout.response_ids) for s in samples
    ]
    batches = micro_batches(samples, budget)
    assert [s for batch in batches for s in batch] == samples and all(batches)
    for batch in batches:
        cost = sum(len(s.teacher_ids) + len(s.rollout.response_ids) for s in batch)
        assert cost <= budget or len(batch) == 1


def test_groups_stay_together_where_they_fit():
    samples = [sample(g, [1], [1, 2], [3, 4]) for g in "aaabbb"]  # 4 tokens each
    assert [len(b) for b in micro_batches(samples, 12)] == [3, 3]
    assert [len(b) for b in micro_batches(samples, 16)] == [3, 3]
    assert [len(b) for b in micro_batches(samples, 24)] == [6]
    assert [len(b) for b in micro_batches(samples, 8)] == [2, 2, 2]


@given(st.lists(ids.map(tuple), min_size=1, max_size=5))
def test_common_prefix_is_the_longest(sequences):
    prefix = common_prefix(sequences)
    assert all(s[: len(prefix)] == prefix for s in sequences)
    longer = {s[: len(prefix) + 1] for s in sequences}
    assert len(longer) > 1 or min(map(len, sequences)) == len(prefix)
