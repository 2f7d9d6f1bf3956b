"""Rows become prompts, or errors that name file, row and field."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest
from rows import write_rows

from fastsd.prompts.files import DataError, read_prompts


def test_fields_of_each_shape(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q<|im_end|>"}]
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"prompt": "one", "answer": 42, "solution": "40+2", "level": 3, "tags": ["a"]},
        "",
        {"messages": turns, "answer": " 4.0 ", "id": 7},
        {"prompt": turns, "answer": 0.5},
        {"question": "three"},
        {"problem": "four", "answer": None},
    )
    one, two, three, four, five = read_prompts(path, {})
    assert one.messages == ({"role": "user", "content": "one"},) and one.question == "one"
    assert (one.id, one.answer, one.solution) == ("rows.jsonl:1", "42", "40+2")
    assert one.columns == {"level": 3, "tags": ["a"]}
    assert two.messages == tuple(turns) and two.question == "q<|im_end|>"
    assert (two.id, two.answer, two.columns) == ("7", " 4.0 ", {})
    assert three.messages == tuple(turns) and three.answer == "0.5"
    assert (four.id, four.answer, four.solution) == ("rows.jsonl:5", None, None)
    assert five.question == "four" and five.answer is None


def test_mapping(tmp_path):
    row = {"prompt": "not this", "task_text": "this", "expected_answer": "1", "answer": "no"}
    path = write_rows(tmp_path / "rows.jsonl", row)
    columns = {"question": "task_text", "answer": "expected_answer"}
    (prompt,) = read_prompts(path, columns)
    assert (prompt.question, prompt.answer) == ("this", "1")
    assert prompt.columns == {"prompt": "not this", "answer": "no"}


def test_parquet_is_read_like_jsonl(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "q1", "name": None}], "answer": "1", "n": 1},
        {"messages": [{"role": "user", "content": "q2", "name": None}], "answer": None, "n": 2},
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = read_prompts(path, {})
    assert first.messages == ({"role": "user", "content": "q1"},)
    assert (second.id, second.answer, second.columns) == ("rows.parquet:2", None, {"n": 2})


GOOD = {"prompt": "q", "answer": "1"}
USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([GOOD, '{"prompt": "q"'], {}, "row 2: not JSON"),
        ([GOOD, "", "[" * 100_000], {}, "row 3: not JSON"),
        ([GOOD, "[1]"], {}, r"row 2: expected an object with columns, found list \[1\]"),
        ([], {}, "has no rows"),
        ([GOOD, {"prompt": 3}], {}, "row 2, prompt: expected text, found int 3"),
        ([{"prompt": " "}], {}, "row 1, prompt: the text is empty"),
        ([{"prompt": "\ud800"}], {}, "row 1, prompt: not valid Unicode"),
        ([{"prompt": []}], {}, r"row 1, prompt: expected a list of messages, found list \[\]"),
        ([{"messages": "q"}], {}, "row 1, messages: expected a list of messages, found str"),
        ([{"messages": ["q"]}], {}, r"messages\[0\]: expected an object with role"),
        ([{"messages": [{**USER, "role": "User"}]}], {}, r"messages\[0\].role.*'User'"),
        ([{"messages": [{"role": "user"}]}], {}, r"messages\[0\].content: .* found nothing"),
        ([{"messages": [{**USER, "tool": 1}]}], {}, r"messages\[0\].tool: only role and content"),
        ([{"messages": [USER, {**USER, "role": "assistant"}]}], {}, "must be the user's.*assist"),
        ([{"answer": "1"}], {}, "row 1: no question; .*found answer; map yours"),
        ([{"prompt": "a", "problem": "b"}], {}, "prompt, problem could each be the question"),
        ([{**GOOD, "answer": [1]}], {}, r"row 1, answer: expected text, found list \[1\]"),
        ([{**GOOD, "answer": True}], {}, "row 1, answer: expected text, found bool True"),
        ([{**GOOD, "answer": ""}], {}, "row 1, answer: the text is empty"),
        (['{"prompt": "q", "answer": NaN}'], {}, "row 1, answer: expected text, found float nan"),
        ([{**GOOD, "solution": {}}], {}, "row 1, solution: expected text, found dict {}"),
        ([{**GOOD, "id": "a"}] * 2, {}, "row 2, id: 'a' is also the id of row 1"),
        ([{**GOOD, "id": 1.5}], {}, "row 1, id: expected text, found float 1.5"),
        ([GOOD], {"anwser": "x"}, "no field 'anwser'; did you mean 'answer'"),
        ([{"promt": "q"}], {"question": "prompt"}, "'prompt'.*columns.question.*mean 'promt'"),
    ],
)
def test_located_errors(tmp_path, rows, columns, message):
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(path, columns)
    if not columns or "columns" not in str(caught.value)[:20]:
        assert str(path) in str(caught.value)


def test_file_errors(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: there is no such file"):
        read_prompts(tmp_path / "nowhere.jsonl", {})
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match="expected a .jsonl or .parquet"):
        read_prompts(tmp_path / "rows.csv", {})
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="row 2: not UTF-8"):
        read_prompts(tmp_path / "rows.jsonl", {})
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable parquet"):
        read_prompts(tmp_path / "rows.parquet", {})
