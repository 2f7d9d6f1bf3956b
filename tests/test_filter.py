"""Hard but learnable: the verdicts by themselves, and the command on real models and files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs import small_config
from tiny_models import build_tiny

from fastsd.critics.text import Reply, TextCritic
from fastsd.data import main, read_prompts
from fastsd.filter import KEPT, VERDICTS, Filter, FilterError, row_of
from fastsd.filter_command import Request, filter_config
from fastsd.sections import CriticConfig
from fastsd.tasks import load_task
from fastsd.types import CriticUnavailable, Critique, Prompt, Rollout
from fastsd.verify import exact_reward

STEPS = "1. one\n2. two\nAnswer: "
PLAIN = "it is clear. Answer: "


class Answers:
    """A sampler whose responses are given: question -> its responses."""

    def __init__(self, texts: dict[str, list[str]]):
        self.texts = texts

    def sample(self, prompts, samples, key):
        assert all(len(self.texts[p.question]) == samples for p in prompts)
        return [
            Rollout(p, n, (1,), (0.0,), text, truncated=False)
            for p in prompts
            for n, text in enumerate(self.texts[p.question])
        ]


class Rules:
    """A critic by rules: its critique of the attempt, None where it has nothing to say."""

    name = "rules"

    def __init__(self, texts: dict[str, str | None]):
        self.texts, self.asked = texts, []

    def critique(self, rollouts):
        self.asked += [(r.prompt.question, r.sample) for r in rollouts]
        return [Critique(self.texts[r.prompt.question]) for r in rollouts]


def question(name: str, answer: str = "7") -> Prompt:
    return Prompt(name, ({"role": "user", "content": name},), answer=answer)


def judged(texts, critic=None, reward=exact_reward, **settings) -> list[str]:
    settings = {"samples": 4, "format": "any", **settings}
    config = small_config("reference", filter=settings)
    judge = Filter(config, Answers(texts), reward, critic)
    return judge.verdicts([question(name) for name in texts])


def with_right(count: int, start: str = PLAIN) -> list[str]:
    return [start + ("7" if n < count else "8") for n in range(4)]


def test_by_the_share_that_is_right():
    texts = {f"q{count}": with_right(count) for count in range(5)}
    kept, easy, hopeless = KEPT, "too_easy", "hopeless"
    assert judged(texts, below=0.5) == [kept, kept, easy, easy, easy]
    assert judged(texts, below=0.51) == [kept, kept, kept, easy, easy]
    assert judged(texts, below=0.75, above=0.0) == [hopeless, kept, kept, easy, easy]
    assert judged(texts, below=1.0, above=0.25) == [hopeless, hopeless, kept, kept, easy]


def test_the_share_is_of_the_responses_that_are_scored():
    def reward(completions, **columns):
        scores = {"7": 1.0, "8": 0.0, "9": None}
        return [scores[c[-1]["content"][-1]] for c in completions]

    texts = {"a": ["7", "9", "9", "9"], "b": ["9"] * 4, "c": ["7", "8", "8", "9"]}
    assert judged(texts, reward=reward, below=0.5) == ["too_easy", "unscored", KEPT]


@pytest.mark.parametrize(
    ("form", "share", "want"),
    [("steps", 0.5, KEPT), ("steps", 0.51, "format"), ("tags", 0.5, "format"), ("any", 1.0, KEPT)],
)
def test_by_the_form_of_the_responses(form, share, want):
    texts = {"q": [STEPS + "8", PLAIN + "8", STEPS + "8", PLAIN + "8"]}
    assert judged(texts, format=form, format_share=share) == [want]


def test_the_critic_is_asked_about_what_is_left():
    texts = {
        "easy": with_right(4, STEPS),
        "formless": with_right(0),
        "right": with_right(1, STEPS),
        "wrong": with_right(1, STEPS),
        "silent": with_right(0, STEPS),
        "late": with_right(0, STEPS),
    }
    critic = Rules(
        {"right": "Answer: 7", "wrong": "Answer: 8", "silent": None, "late": "\\boxed{7}"}
    )
    verdicts = judged(texts, critic, format="steps")
    assert verdicts == ["too_easy", "format", KEPT, "critic", "critic", KEPT]
    assert critic.asked == [("right", 0), ("wrong", 0), ("silent", 0), ("late", 0)]
    assert judged({"easy": with_right(4)}, critic) == ["too_easy"]


def test_a_model_is_shown_the_question_alone(tmp_path):
    class Scripted:
        name, identity = "scripted", {}

        def write(self, conversations):
            assert not any("ATTEMPT" in turn["content"] for c in conversations for turn in c)
            known = {"right": Reply("<think>8?</think> \\boxed{7}"), "wrong": Reply("\\boxed{8}")}
            gone = Reply(None, failure="timeout")
            words = [c[-1]["content"].split() for c in conversations]
            return [next((known[w] for w in known if w in said), gone) for said in words]

    critic = TextCritic(Scripted(), CriticConfig(kind="local"), tmp_path, exact_reward, None)
    texts = {name: ["ATTEMPT 7", "8", "8", "8"] for name in ("right", "wrong", "silent")}
    assert judged(texts, critic) == [KEPT, "critic", "critic"]


def test_a_dead_critic_is_no_verdict():
    class Dead(Rules):
        def critique(self, rollouts):
            raise CriticUnavailable("gone")

    with pytest.raises(CriticUnavailable):
        judged({"q": with_right(0)}, Dead({}))


def test_rows_are_read_back_as_they_were(tmp_path):
    turns = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": 'q"<|im_end|>\n\u2028'},
    )
    prompts = [
        Prompt("a/1", turns, answer="1", columns={"level": 3, "tags": ["x", None]}),
        Prompt("b", ({"role": "user", "content": "q"},), answer="2", solution="1+1\n=2"),
    ]
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(row_of(prompt) + "\n" for prompt in prompts))
    assert read_prompts(path, {}) == prompts
    with pytest.raises(FilterError, match="row b: the column 'problem' is not the question"):
        row_of(replace(prompts[1], columns={"problem": "p"}))
    with pytest.raises(FilterError, match="row b, column 'when': .*not JSON serializable"):
        row_of(replace(prompts[1], columns={"when": object()}))


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


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
