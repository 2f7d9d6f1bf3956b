"""Sources of questions lose and repeat nothing; what a run needs is there or is asked for."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from rows import write_rows

from fastsd.config.sections import DataConfig
from fastsd.data import main
from fastsd.prompts.files import DataError, read_prompts
from fastsd.prompts.sources import RowSource, load_held_out, load_training
from fastsd.tasks import load_task


@pytest.fixture
def prompts(tmp_path):
    return read_prompts(
        write_rows(tmp_path / "rows.jsonl", *({"prompt": f"q{n}"} for n in range(17))), {}
    )


def test_every_epoch_has_every_row_once(prompts):
    source = RowSource(prompts, shuffle=True)
    ids = [prompt.id for prompt in source.take(0, 17 * 5, seed=3)]
    epochs = [ids[start : start + 17] for start in range(0, len(ids), 17)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(prompt.id for prompt in prompts)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert ids != [prompt.id for prompt in source.take(0, 17 * 5, seed=4)]
    in_order = RowSource(prompts, shuffle=False).take(0, 34, seed=3)
    assert [p.id for p in in_order] == [p.id for p in prompts] * 2


def test_50_interruptions_change_no_prompt(prompts):
    straight = RowSource(prompts, shuffle=True).take(0, 400, seed=1)
    rng = random.Random(0)
    cursor, resumed = 0, []
    for _ in range(50):
        source = RowSource(prompts, shuffle=True)
        for _ in range(rng.randrange(1, 4)):
            count = rng.randrange(1, 5)
            resumed += source.take(cursor, count, seed=1)
            cursor += count
    assert [p.id for p in resumed] == [p.id for p in straight[:cursor]] and cursor > 150


def test_task_source():
    task = load_task("chain_sum")
    config = DataConfig(task="chain_sum")
    train, held_out = load_training(config, task, 0), load_held_out(config, task)
    first = train.take(0, 8, seed=0)
    assert first == [task.prompt("train", index) for index in range(8)]
    assert train.take(3, 5, seed=0) == first[3:] and train.first(8, seed=0) == first
    questions = {seed: {p.question for p in train.take(0, 64, seed)} for seed in range(4)}
    assert all(not questions[a] & questions[b] for a in range(4) for b in range(a))
    assert held_out(3) == [task.prompt("eval", index) for index in range(3)]


def test_rows_of_files_and_their_errors(tmp_path):
    rows = [{"q": f"q{n}"} for n in range(3)]
    train_file = str(write_rows(tmp_path / "train.jsonl", *rows))
    eval_file = str(write_rows(tmp_path / "eval.jsonl", *rows[:2]))
    columns = {"question": "q"}
    config = DataConfig(train=train_file, eval=eval_file, columns=columns, shuffle=False)
    train, held_out = load_training(config, None, 0), load_held_out(config, None)
    assert [p.question for p in train.take(0, 4, 0)] == ["q0", "q1", "q2", "q0"]
    assert [p.question for p in train.first(2, 0)] == ["q0", "q1"] and len(train.first(9, 0)) == 3
    assert [p.id for p in held_out(1)] == ["eval.jsonl:1"] and len(held_out(9)) == 2
    with pytest.raises(DataError, match="set data.task or data.train"):
        load_training(DataConfig(), None, 0)
    with pytest.raises(DataError, match="set data.eval"):
        load_held_out(DataConfig(train=train_file, columns=columns), None)
    with pytest.raises(DataError, match="seed = -1"):
        load_training(config, None, -1)
    assert DataError.exit_code == 2


def test_check_command(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", {"q": "why"}, {"q": "how"})
    assert main(["check", str(path), "question=q"]) == 0
    printed = capsys.readouterr().out
    assert "2 rows" in printed and "why" in printed
    assert main(["check", str(path)]) == 2
    assert "row 1: no question" in capsys.readouterr().err
    assert main([]) == 2
