"""python -m fastsd.advantage: any model and data, without training."""

from __future__ import annotations

import json

import pytest
from tiny_models import build_tiny_llama

from fastsd.advantage import main, parse
from fastsd.errors import CriticUnavailable


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build_tiny_llama(tmp_path_factory.mktemp("model")))


def rows(path, solution="1. say\n2. {i}"):
    lines = [{"question": f"Say {i}", "answer": str(i)} for i in range(3)]
    if solution:
        lines = [{**line, "solution": solution.format(i=i)} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


SMALL = ["--rollout.max_new_tokens", "10", "--reward.function", "exact", "--samples", "2"]
SMALL += ["--threads", "1", "--model.dtype", "float32"]


def printed(capsys, *words) -> dict:
    assert main(list(words)) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words) -> str:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_the_shipped_base_on_its_task_as_json(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = printed(capsys, "chain_sum", "chain_sum", "--questions=3", "--json", "--samples", "2")
    assert found["localisation"].keys() == {"reference", "critique"}
    views = found["views"]
    assert [v["context"] for v in views] == ["reference", "critique"] * 6
    for view in views:
        tokens = len(view["spans"])
        for name in ("advantage", "teacher_logprob", "divergence", "entropy", "alternatives"):
            assert len(view[name]) == tokens > 0
        difference = view["teacher_logprob"][0] - view["student_logprob"][0]
        assert view["advantage"][0] == pytest.approx(difference, abs=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_the_table_and_the_page(capsys, tmp_path):
    page = tmp_path / "pages" / "tokens.html"
    words = ["--questions", "3", "--samples", "2", "--report.rollouts", "2", "--out", str(page)]
    assert main(["chain_sum", "chain_sum", "--contexts", "critique,sibling", *words]) == 0
    out = capsys.readouterr().out
    assert "3 questions of chain_sum x 2 samples" in out and f"page: {page}" in out
    header, *lines = out.splitlines()[1:-1]
    assert header.split() == ["teacher", "sees", "critique", "sibling"]
    assert any(line.startswith("mean |A| before") for line in lines)
    assert "log T" in page.read_text()


def test_your_own_rows_with_a_replayed_critic(capsys, tmp_path, model):
    data = rows(tmp_path / "rows.jsonl")
    base = [model, data, *SMALL, "--json"]
    found = printed(capsys, *base, "--contexts", "reference")
    responses = {(v["question"], v["response"]) for v in found["views"]}
    assert len(found["views"]) == 6 and len(responses) > 3
    lines = [
        {"question": q, "response": r, "critique": f"1. say\n\n2. so\n\n\\boxed{{{q[-1]}}}"}
        for q, r in sorted(responses)[1:]
    ]
    replay = tmp_path / "critiques.jsonl"
    replay.write_text("".join(json.dumps(line) + "\n" for line in lines))
    critic = ["--critic.kind", "replay", "--critic.file", str(replay)]
    found = printed(capsys, *base, *critic)
    assert found["contexts"] == ["reference", "critique"]
    by_context = {
        name: [v for v in found["views"] if v["context"] == name] for name in found["contexts"]
    }
    shown = [v["feedback"] is not None for v in by_context["critique"]]
    assert any(shown) and not all(shown)
    for view in by_context["critique"]:
        assert (view["advantage"] != []) == (view["feedback"] is not None)
        assert (view["problem"] is None) == (view["feedback"] is not None)
    assert all(v["advantage"] for v in by_context["reference"])
    where = found["localisation"]["critique"]["sums"]
    counted = where["wrong_responses"] + where["correct_responses"] + where["unplaced"]
    assert counted == 6 and where["unplaced"] >= shown.count(False)


def test_mistakes_of_the_command_line_name_the_fix(capsys, tmp_path, model):
    data, bare = rows(tmp_path / "a.jsonl"), rows(tmp_path / "b.jsonl", solution=None)
    small = [*SMALL, "--json"]
    assert "name a checkpoint and its data" in refused(capsys, model)
    assert "name a checkpoint and its data" in refused(capsys, model, "--json", data)
    wrong = refused(capsys, model, data, "--contexts", "reference,hints", *small)
    assert "no context 'hints'; there are: reference, critique, sibling" in wrong
    assert "there are" in refused(capsys, model, data, "--contexts", "grpo", *small)
    assert "no context is named" in refused(capsys, model, data, "--contexts", ",", *small)
    assert "--contexts: needs a value" in refused(capsys, model, data, "--contexts", "--json")
    assert "neither a .jsonl or .parquet file nor a task" in refused(capsys, model, "gsm8k")
    reference = [model, data, "--contexts", "reference", *small]
    assert "found 0" in refused(capsys, *reference, "--questions", "0")
    lacking = refused(capsys, model, bare, "--contexts", "reference", *small)
    assert (
        "b.jsonl, row 1, solution: missing" in lacking
        and '--contexts "reference" shows it' in lacking
    )
    no_critic = refused(capsys, model, data, "--contexts", "reference,critique", *small)
    assert 'critic.kind = "rule" needs data.task' in no_critic and "replay" in no_critic
    critic = ["--critic.kind", "replay", "--contexts", "critique"]
    assert "critic.file: not set" in refused(capsys, model, data, *critic, *small)
    assert "--optim.learn" in refused(capsys, *reference, "--optim.learn", "1")
    gone = refused(capsys, model, str(tmp_path / "gone.jsonl"), "--contexts", "reference", *small)
    assert "gone.jsonl" in gone


def test_a_dead_critic_ends_with_three(capsys, tmp_path, model, monkeypatch):
    class Dead:
        def critique(self, rollouts):
            raise CriticUnavailable("the critic at http://127.0.0.1:9 does not answer")

    monkeypatch.setattr("fastsd.evaluation.solver.open_critic", lambda *_, **__: Dead())
    critic = [
        "--critic.kind",
        "server",
        "--critic.model",
        "m",
        "--critic.url",
        "http://127.0.0.1:9",
    ]
    words = [model, rows(tmp_path / "a.jsonl"), *SMALL, "--contexts", "critique", *critic]
    assert main(words) == 3
    assert "does not answer" in capsys.readouterr().err


def test_words_of_the_command_line():
    request = parse(["m", "d.jsonl", "my.toml", "--contexts=sibling, critique,sibling", "--json"])
    assert request.contexts == ["sibling", "critique"] and request.json
    assert request.settings == ["my.toml"]
    request = parse(["m", "d.jsonl", "--optim.lr", "1", "--questions", "5", "--out", "x.html"])
    assert request.settings == ["--optim.lr", "1", "--report.questions", "5"]
    assert str(request.out) == "x.html" and request.contexts == ["reference", "critique"]


def test_help_and_nothing(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    assert "usage: python -m fastsd.advantage CHECKPOINT DATA" in capsys.readouterr().out
