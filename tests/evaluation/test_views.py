"""Token views as a file: what is written is read, and what is not ours is refused by name."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade_views import make_view

from fastsd.evaluation.views import (
    TokenViewError,
    by_rollout,
    choose_rollouts,
    read_views,
    write_views,
)
from fastsd.types import Step

HOSTILE = "</script>\u202e<|im_end|>\x00\x1b[31m{0}$x$😀"


def test_views_survive_the_file(tmp_path):
    views = [
        make_view(advantage=[0.1, -1 / 3, 1e-30, -2e5]),
        make_view("reference", problem="timeout", reward=None, answer=None, sample=3),
        make_view(HOSTILE, response=HOSTILE, feedback=HOSTILE, question=HOSTILE, steps=()),
        make_view(alternatives=((), ((HOSTILE, -0.1),), (), ())),
    ]
    path = write_views(tmp_path / "advantages.parquet", views)
    assert read_views(path) == views
    assert [file.name for file in tmp_path.iterdir()] == ["advantages.parquet"]
    assert read_views(write_views(tmp_path / "none.parquet", [])) == []


def test_advantage_is_the_difference_of_the_log_probs():
    view = make_view(advantage=[0.5, -2.0])
    assert view.advantage == (0.5, -2.0) and view.taught
    untaught = make_view(problem="timeout")
    assert untaught.advantage == () and not untaught.taught


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = write_views(tmp_path / "advantages.parquet", [make_view()])

    def full(table, where, **options):
        where.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        write_views(path, [make_view(), make_view()])
    assert read_views(path) == [make_view()]


def test_files_that_are_no_views_are_named(tmp_path):
    with pytest.raises(TokenViewError, match=r"gone\.parquet: No such file"):
        read_views(tmp_path / "gone.parquet")
    with pytest.raises(TokenViewError, match="cannot read .*Is a directory"):
        read_views(tmp_path)
    garbage = tmp_path / "garbage.parquet"
    garbage.write_bytes(b"PAR1 and not much else PAR1")
    with pytest.raises(TokenViewError, match=r"garbage\.parquet is not a parquet file"):
        read_views(garbage)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"context": ["critique"]}), other)
    with pytest.raises(TokenViewError, match="version 1, found version none with columns context"):
        read_views(other)


def test_a_file_of_another_version_is_refused(tmp_path):
    path = write_views(tmp_path / "views.parquet", [make_view()])
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"fastsd.token_views": b"2"}), path)
    with pytest.raises(TokenViewError, match="found version 2"):
        read_views(path)


@pytest.mark.parametrize("name", ["entropy", "student_logprob", "teacher_logprob", "alternatives"])
def test_rows_whose_lengths_differ_are_refused(name, tmp_path):
    short = make_view(**{name: getattr(make_view(), name)[:-1]})
    path = write_views(tmp_path / "views.parquet", [make_view(), short])
    with pytest.raises(TokenViewError, match=rf"views\.parquet, row 2: 4 tokens and 3 .* {name}"):
        read_views(path)


def test_a_missing_value_is_refused(tmp_path):
    path = write_views(tmp_path / "views.parquet", [make_view(question=None)])
    with pytest.raises(TokenViewError, match="row 1: question is missing"):
        read_views(path)


def test_marked_wrong_rollouts_are_shown_first_then_right_ones():
    def both(number, **fields):
        return [make_view(c, prompt_id=f"q{number}", **fields) for c in ("reference", "critique")]

    right = {"steps": (Step(0, 5, True),), "reward": 1.0}
    groups = [
        both(0, steps=(), reward=0.0),
        both(1, **right),
        both(2),
        both(3, steps=(), reward=None),
        both(4, problem="timeout"),
    ]
    views = [view for group in groups for view in group]
    assert by_rollout(views) == groups
    for count, order in ((0, []), (1, [2]), (3, [2, 4, 1]), (9, [2, 4, 1, 0, 3])):
        chosen = choose_rollouts(views, count)
        assert chosen == [view for number in order for view in groups[number]]


def test_a_quarter_of_the_places_is_kept_for_right_rollouts():
    def one(number, **fields):
        return make_view("critique", prompt_id=f"q{number}", **fields)

    wrong = [one(number) for number in range(10)]
    right = [one(number, steps=(Step(0, 5, True),), reward=1.0) for number in range(10, 14)]
    assert choose_rollouts([*right, *wrong], 8) == [*wrong[:6], *right[:2]]
    assert choose_rollouts([*wrong, *right[:1]], 8) == [*wrong[:7], right[0]]
    assert choose_rollouts(wrong, 8) == wrong[:8]
