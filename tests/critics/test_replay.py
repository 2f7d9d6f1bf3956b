"""Critiques from files: a run's own parquet, folders, JSON lines; validated; errors name rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastsd.config.sections import CriticConfig
from fastsd.critics.replay import ReplayCritic, read_critiques
from fastsd.prompts.files import DataError
from fastsd.records.completions import CompletionRow, write_completions
from fastsd.rewards.functions import exact_reward
from fastsd.types import Prompt, Rollout

GOOD = "Step 1: 1+2=3\nAnswer: 3"
BAD = "Step 1: 1+2=4\nAnswer: 4"


def rollout_of(question: str, text: str = BAD) -> Rollout:
    messages = ({"role": "system", "content": "S"}, {"role": "user", "content": question})
    return Rollout(Prompt(question, messages, answer="3"), 0, (1,), (0.0,), text, False, 0.0)


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(question="Q", response=BAD, critique: object = GOOD) -> dict:
    return {"question": question, "response": response, "critique": critique}


def replay(name: str) -> ReplayCritic:
    return ReplayCritic(CriticConfig(kind="replay", file=name), exact_reward, None)


def test_rows_are_found_by_question_and_response_and_validated(tmp_path):
    rows = [
        row("Q1"),
        row("Q2", critique=BAD),
        row("Q3", critique=""),
        row("Q4", critique=None),
        row("Q5", response=BAD + " "),
        row("Q6", critique="Step 1: 0\nAnswer: 0"),
        {**row("Q6"), "model": "extra columns are welcome"},
    ]
    critic = replay(jsonl(tmp_path / "c.jsonl", rows))
    critiques = critic.critique([rollout_of(f"Q{i}") for i in range(1, 8)])
    assert [c.problem for c in critiques] == [
        *(None, "wrong_answer", "empty", "not_in_file", "not_in_file", None, "not_in_file")
    ]
    assert critiques[0].text == critiques[5].text == GOOD
    assert critiques[0].first_error == 0 and critiques[0].prefix_share == 0
    assert all(c.text is None for c in critiques if c.problem)
    assert critic.critique([rollout_of("Q5", BAD + " ")])[0].text == GOOD
    assert "5 critiques" in critic.name and "c.jsonl" in critic.name


def completion(question: str, critique: str | None) -> CompletionRow:
    return CompletionRow(rollout_of(question), advantage=0.0, critique=critique, divergence=None)


def test_a_run_is_replayed_from_its_completions(tmp_path):
    first = write_completions(tmp_path, 1, [completion("Q1", GOOD), completion("Q2", None)])
    write_completions(tmp_path, 2, [completion("Q3", GOOD), completion("Q1", GOOD + " ")])
    rollouts = [rollout_of(f"Q{i}") for i in (1, 2, 3)]
    alone = [c.problem for c in replay(str(first)).critique(rollouts)]
    assert alone == [None, "not_in_file", "not_in_file"]
    critiques = replay(str(tmp_path / "completions")).critique(rollouts)
    assert [c.problem for c in critiques] == [None, "not_in_file", None]
    assert critiques[0].text == GOOD  # the later one, stripped
    assert len(read_critiques(str(tmp_path / "completions"))) == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(), {"question": "Q", "response": "r"}], "row 2: there is no column 'critique'"),
        ([row(), 3], "row 2: expected an object"),
        ([row(), row(question=7)], "row 2, question: expected text, found int"),
        ([row(), row(critique=["x"])], "row 2, critique: expected text, found list"),
        ([row(critique=None)], "holds no critique"),
        ([], "holds no critique"),
    ],
)
def test_bad_rows_are_named(rows, words, tmp_path):
    name = jsonl(tmp_path / "c.jsonl", rows)
    with pytest.raises(DataError) as caught:
        replay(name)
    assert words in str(caught.value) and "c.jsonl" in str(caught.value)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "broken.jsonl").write_text(json.dumps(row()) + "\n{")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.txt").write_text("x")
    for name, words in [
        ("broken.jsonl", "row 2: not JSON"),
        ("broken.parquet", "broken.parquet: not a readable parquet"),
        ("empty", "holds no .parquet file"),
        ("c.txt", "expected a .jsonl or .parquet"),
        ("no.jsonl", "there is no such file"),
    ]:
        with pytest.raises(DataError, match=words):
            replay(str(tmp_path / name))


def test_parquet_of_another_shape_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"prompt": ["Q"], "completion": ["r"], "critique": [GOOD]}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="row 1, prompt: expected chat messages"):
        replay(str(tmp_path / "c.parquet"))
    pq.write_table(pa.table({"prompt": ["Q"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="row 1: there is no column 'completion'"):
        replay(str(tmp_path / "c.parquet"))
