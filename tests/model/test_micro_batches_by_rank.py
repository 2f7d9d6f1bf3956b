"""A step's samples over ranks: nothing lost, groups whole, the same passes on every rank."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.model.micro_batches import micro_batches_by_rank
from fastsd.types import Prompt, Rollout, Sample


def group(name: str, size: int, prompt: int, response: int, taught: bool) -> list[Sample]:
    asked = Prompt(name, ({"role": "user", "content": "q"},))
    ids, teacher = tuple(range(prompt)), (*range(prompt), 7, 7) if taught else None
    return [
        Sample(Rollout(asked, n, (1,) * response, (0.0,) * response, "", False), ids, teacher, 1.0)
        for n in range(size)
    ]


GROUPS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(1, 9), st.booleans()), max_size=9
)


@settings(max_examples=200, deadline=None)
@given(GROUPS, st.integers(1, 60), st.integers(2, 4))
def test_every_sample_once_and_the_same_passes_everywhere(shapes, budget, ranks):
    samples = [s for n, shape in enumerate(shapes) for s in group(str(n), *shape)]
    by_rank = micro_batches_by_rank(samples, budget, ranks)
    assert len(by_rank) == ranks and len({len(batches) for batches in by_rank}) == 1
    placed = [s for batches in by_rank for b in batches for s in b.samples if not s.dropped]
    assert sorted(map(id, placed)) == sorted(map(id, samples))
    homes: dict[str, set[int]] = {}
    for rank, batches in enumerate(by_rank):
        for batch in batches:
            assert len(batch.parts) == 1 and not batch.deferred and batch.samples
            for sample in batch.samples:
                if not sample.dropped:
                    homes.setdefault(sample.group, set()).add(rank)
    assert all(len(home) == 1 for home in homes.values())
    for together in zip(*by_rank, strict=True):
        teaches = [any(s.teacher_ids is not None for s in batch.samples) for batch in together]
        assert len(set(teaches)) == 1
        for batch in together:
            padding = [s.dropped for s in batch.samples]
            assert padding == sorted(padding) and sum(padding) <= 1  # last, and one at most


def test_padding_is_a_group_of_its_own_that_counts_for_nothing():
    samples = group("a", 2, 6, 5, True)
    [[first], [second]] = micro_batches_by_rank(samples, 100, 2)
    assert list(first.samples) == samples
    [padding] = second.samples
    assert padding.dropped and padding.advantage == 0 and padding.group != "a"
    assert padding.student_ids == (0, 1) and padding.teacher_ids == (0, 1)
    assert padding.rollout.response_ids == (1,)


def test_the_longest_groups_go_first_each_to_the_rank_with_least():
    samples = [
        s for n, length in enumerate((2, 9, 8, 3)) for s in group(str(n), 4, 4, length, False)
    ]
    by_rank = micro_batches_by_rank(samples, 1000, 2)
    names = [sorted({s.group for b in batches for s in b.samples}) for batches in by_rank]
    assert names == [["0", "1"], ["2", "3"]]


def test_no_samples_are_no_passes():
    assert micro_batches_by_rank([], 100, 3) == [[], [], []]
