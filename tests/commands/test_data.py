"""`python -m fastsd.data filter`: the command line, and the command on real models and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rows import write_rows
from tiny_models import build_tiny

from fastsd.data import Request, filter_config, main
from fastsd.evaluation.filter import KEPT, VERDICTS, Filter, FilterError
from fastsd.prompts.files import read_prompts
from fastsd.tasks import load_task


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.toml"], "--out: name a .jsonl file .* missing"),
        (["--out"], "--out: name a .jsonl"),
        (["--out", "kept.parquet"], "found 'kept.parquet'"),
        (["--out", "k.jsonl", "--rows", "0"], "--rows 0: expected"),
        (["--out", "k.jsonl", "--rows=-3"], "--rows -3: expected"),
    ],
)
def test_command_line_mistakes(words, message):
    with pytest.raises(FilterError, match=message):
        Request.parse(words)


def test_command_line():
    words = ["a.toml", "--out=k.jsonl", "--rows", "8", "--filter.below", "0.5", "--force", "b.toml"]
    want = Request(("a.toml", "--filter.below", "0.5", "b.toml"), Path("k.jsonl"), 8, True)
    assert Request.parse(words) == want


def test_out_overwrites_nothing(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "1"}\n')
    kept = tmp_path / "kept.jsonl"
    kept.write_text("mine")
    for words, message in (
        (["--out", str(kept)], "there already; add --force"),
        (["--out", str(rows), "--force"], "that is data.train itself"),
        (["--out", str(tmp_path / "no" / "kept.jsonl")], "there is no folder"),
    ):
        options = ["--data.train", str(rows), "--model.name", "chain_sum"]
        assert main(["filter", *options, "--filter.critic_solves", "false", *words]) == 2
        assert message in capsys.readouterr().err
    assert kept.read_text() == "mine"


def test_which_critics_can_solve(tmp_path):
    words = ["--data.train", "rows.jsonl", "--model.name", "m"]
    with pytest.raises(FilterError, match='"rule" cannot solve.*needs data.task'):
        filter_config(words)
    replay = ["--critic.kind", "replay", "--critic.file", "x.jsonl"]
    with pytest.raises(FilterError, match='"replay" cannot solve.*only knows the attempts'):
        filter_config([*words, *replay])
    assert filter_config([*words, "--filter.critic_solves", "false"]).data.train == "rows.jsonl"
    toml = tmp_path / "run.toml"
    toml.write_text('[data]\ntrain = "a.jsonl"\neval = "b.jsonl"\n[model]\nname = "m"\n')
    config = filter_config([str(toml), "--critic.kind", "local", "--critic.model", "c"])
    assert (config.data.eval, config.critic.model) == ("b.jsonl", "c")


CHAIN_SUM = ["--filter.format", "any", "--filter.samples", "8", "--rows", "40"]


def filtered(tmp_path, capsys, *words: str):
    """(exit code, the last line's counts, the rows kept)"""
    out = tmp_path / "kept.jsonl"
    code = main(["filter", "--out", str(out), *CHAIN_SUM, *words])
    output = capsys.readouterr().out
    counts = json.loads(output.splitlines()[-1]) if code == 0 else {}
    return code, counts, read_prompts(out, {}) if out.exists() else []


def test_the_shipped_base(tmp_path, capsys):
    """It solves about a third; critiques that go on from the attempt's own error end wrong."""
    words = ["--filter.below", "0.3", "--critic.variant", "continued"]
    code, counts, kept = filtered(tmp_path, capsys, *words)
    assert code == 0 and counts["rows"] == 40 == sum(counts[verdict] for verdict in VERDICTS)
    assert counts["too_easy"] > 3 and counts["critic"] == 0 and counts["kept"] == len(kept) > 10
    task = load_task("chain_sum")
    questions = [task.prompt("train", index) for index in range(40)]
    places = [questions.index(prompt) for prompt in kept]
    assert places == sorted(places)
    small = [*words, "--rollout.batch_rows", "6", "--force"]  # 13 batches of three, one of one
    _, again, kept_again = filtered(tmp_path, capsys, *small)
    assert kept_again == kept and again | {"seconds": 0} == counts | {"seconds": 0}
    _, other, fewer = filtered(tmp_path, capsys, *words, "--critic.variant", "local", "--force")
    assert other["too_easy"] == counts["too_easy"] and other["critic"] > 3
    assert {p.id for p in fewer} < {p.id for p in kept}


def test_nothing_left_is_said_and_not_written(tmp_path, capsys):
    out = tmp_path / "kept.jsonl"
    words = ["--out", str(out), *CHAIN_SUM, "--rows", "4", "--filter.below", "0"]
    assert main(["filter", *words]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["too_easy"] == 4
    assert "no question is left" in printed.err and list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def verdicts(self, prompts):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [KEPT] * len(prompts)

    monkeypatch.setattr(Filter, "verdicts", verdicts)
    batches = ["--rollout.batch_rows", "8"]
    assert main(["filter", "--out", str(tmp_path / "k.jsonl"), *CHAIN_SUM, *batches]) == 130
    assert calls == [4, 4, 4] and list(tmp_path.iterdir()) == []


def test_rows_of_a_file_with_a_local_critic(tmp_path, capsys):
    model = build_tiny("llama", tmp_path / "model")
    good = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "level": n} for n in range(5)]
    rows = write_rows(tmp_path / "rows.jsonl", *good)
    options = ["--data.train", str(rows), "--model.name", str(model), "--reward.function", "exact"]
    options += ["--rollout.max_new_tokens", "8", "--filter.format", "any", "--filter.samples", "2"]
    options += ["--model.dtype", "float32"]
    out = tmp_path / "kept.jsonl"
    assert main(["filter", *options, "--filter.critic_solves", "false", "--out", str(out)]) == 0
    kept = read_prompts(out, {})
    assert [(p.id, p.answer, p.columns) for p in kept] == [
        (f"rows.jsonl:{n + 1}", str(n + 1), {"level": n}) for n in range(5)
    ]
    critic = ["--critic.kind", "local", "--critic.model", str(model), "--critic.max_tokens", "8"]
    asks = ["filter", *options, *critic, "--out", str(tmp_path / "b.jsonl")]
    assert main(asks) == 2, "a random critic solves nothing"
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["critic"] == 5, printed.err
    assert (tmp_path / "b.jsonl.critic").is_dir() and not (tmp_path / "b.jsonl").exists()


def test_row_mistakes_come_before_any_model(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", {"question": "q", "answer": "1"}, {"question": "r"})
    options = ["--data.train", str(rows), "--model.name", "nowhere"]
    options += ["--filter.critic_solves", "false", "--out", str(tmp_path / "k.jsonl")]
    assert main(["filter", *options]) == 2
    assert "rows.jsonl, row 2, answer: missing" in capsys.readouterr().err
    write_rows(rows, {"question": "q", "answer": "1", "prompt": "p"})
    assert main(["filter", *options, "--data.columns.question", "question"]) == 2
    assert "column 'prompt' is not the question" in capsys.readouterr().err


def test_a_question_too_long_is_found_before_sampling(tmp_path, capsys, monkeypatch):
    model = build_tiny("llama", tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", {"question": "q " * 3000, "answer": "1", "id": "me"})
    monkeypatch.setattr(Filter, "verdicts", lambda self, prompts: pytest.fail("sampled"))
    options = ["--data.train", str(rows), "--model.name", str(model), "--filter.critic_solves"]
    options += ["false", "--rollout.max_new_tokens", "8", "--out", str(tmp_path / "k.jsonl")]
    assert main(["filter", *options]) == 2
    assert "prompt 'me'" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys; from fastsd.data import main; assert main(['filter', '--help']) == 0; "
        "assert main(['--help']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hard but learnable" in done.stdout and "--out FILE" in done.stdout
