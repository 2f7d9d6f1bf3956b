"""Hard but learnable: who gets which verdict, and rows that are written as they were read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_runs import small_config

from fastsd.config.sections import CriticConfig
from fastsd.critics.text import TextCritic
from fastsd.errors import CriticUnavailable
from fastsd.evaluation.filter import KEPT, Filter, FilterError, row_of
from fastsd.prompts.files import read_prompts
from fastsd.rewards.functions import exact_reward
from fastsd.serving.cache import Reply
from fastsd.types import Critique, Prompt, Rollout

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
