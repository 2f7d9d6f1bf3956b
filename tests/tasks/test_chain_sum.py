"""The embedded task: questions, checker, judge, critic, reference."""

from __future__ import annotations

import itertools
import random
import tomllib
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.config import Config
from fastsd.pretraining.chain_sum_author import Author
from fastsd.tasks import TaskError, load_task
from fastsd.tasks.chain_sum import (
    DIGITS,
    ChainSum,
    base_path,
    judge,
    questions,
    write_step,
)
from fastsd.types import Step

TASK = ChainSum()
RIGHT = "b+3=e;e+d=b;b+2=d;"

question_texts = st.permutations(DIGITS).map(lambda digits: "".join(digits[:4]))
# Arbitrary text, and text from the task's own alphabet, which gets further into the parser.
responses = st.one_of(st.text(), st.text("0123456789abcdef+=;H?.", max_size=40))


def write(question: str, phrasing: tuple[bool, ...] = (False,) * 3, errors: dict | None = None):
    """An attempt: each value is right for the attempt's own total, plus errors[k]."""
    total, *terms = map(DIGITS.index, question)
    text = ""
    for k, (term, total_right) in enumerate(zip(terms, phrasing, strict=True)):
        value = (total + term + (errors or {}).get(k, 0)) % 16
        text += write_step(total, term, value, total_right)
        total = value
    return text


def test_questions_are_a_deterministic_partition():
    train, held_out = set(questions("train")), set(questions("eval"))
    assert not train & held_out
    assert train | held_out == {"".join(q) for q in itertools.permutations(DIGITS, 4)}
    # A tenth, within five standard deviations of a binomial share (43680 * 0.1 * 0.9)^0.5 = 63.
    assert abs(len(held_out) - 4368) < 5 * 63
    # Frozen: a change of the order would silently change every published figure.
    assert [TASK.prompt("train", i).question for i in range(3)] == ["207d", "d0c3", "be0a"]
    assert [TASK.prompt("eval", i).question for i in range(3)] == ["83bd", "c32d", "5984"]


def test_prompt():
    prompt = TASK.prompt("eval", 5)
    assert prompt == ChainSum().prompt("eval", 5)
    assert prompt.id == "chain_sum/eval/5"
    assert prompt.messages == ({"role": "user", "content": prompt.question},)
    assert len(set(prompt.question)) == 4
    assert prompt.answer == DIGITS[sum(map(DIGITS.index, prompt.question)) % 16]
    assert TASK.reward([prompt.question], [prompt.solution]) == [1.0]
    around = len(questions("eval"))
    assert TASK.prompt("eval", 5 + around).question == prompt.question
    assert TASK.prompt("eval", 5 + around).id != prompt.id


@pytest.mark.parametrize("split, index", [("test", 0), ("train", -1)])
def test_prompt_refuses(split, index):
    with pytest.raises(TaskError, match=split):
        TASK.prompt(split, index)


@pytest.mark.parametrize(
    "response, expected",
    [
        (RIGHT, 1.0),
        ("3+b=e;d+e=b;2+b=d;", 1.0),  # the other phrasing
        ("b+3=e;e+d=c;c+2=d;", 1.0),  # an outcome reward: the answer is right, a step is not
        ("b+3=e;e+d=b;b+2=e;", 0.0),
        ("b+3=e;e+d=b;", 0.0),
        (RIGHT + "d+0=d;", 0.0),
        (RIGHT + "\n", 0.0),
        (RIGHT[:-1], 0.0),
        ("d", 0.0),
        ("", 0.0),
        (RIGHT.upper(), 0.0),
        (RIGHT.replace("2", "\N{ARABIC-INDIC DIGIT TWO}"), 0.0),
        (RIGHT.replace("2", "\N{FULLWIDTH DIGIT TWO}"), 0.0),
        (RIGHT * 200_000, 0.0),
        ("\x00\ud800<eos>", 0.0),
    ],
)
def test_reward(response, expected):
    assert TASK.reward(["b3d2"], [response]) == [expected]


def test_reward_takes_trl_formats():
    prompts = [[{"role": "system", "content": "add"}, {"role": "user", "content": "b3d2"}]] * 4
    completions = [
        [{"role": "assistant", "content": RIGHT}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant"}],
        [],
    ]
    assert TASK.reward(prompts, completions, answer=["d"] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("question", ["", "b3d", "b3d2 ", "b3d2\n", "B3D2", "what is 1+1?"])
def test_foreign_questions_are_errors(question):
    for call in (
        lambda: TASK.reward([question], [RIGHT]),
        lambda: TASK.critique(question, RIGHT, None),
        lambda: TASK.steps(question, RIGHT),
    ):
        with pytest.raises(TaskError, match="hexadecimal digits"):
            call()


@pytest.mark.parametrize(
    "response, correct, spans",
    [
        (RIGHT, [True] * 3, [(0, 6), (6, 12), (12, 18)]),
        ("b+3=e;d+e=c;c+2=e;", [True, False, True], [(0, 6), (6, 12), (12, 18)]),
        ("b+3=e;e+2=0;0+2=2;", [True, False, True], [(0, 6), (6, 12), (12, 18)]),
        ("b+3=e;e+d=b", [True, False], [(0, 6), (6, 11)]),
        ("so: b+3=e;e+d=b;b+2=d;d+0=d;", [False, True, True], [(0, 10), (10, 16), (16, 22)]),
        ("", [], []),
        (";;", [False, False], [(0, 1), (1, 2)]),
    ],
)
def test_steps(response, correct, spans):
    expected = [Step(*span, right) for span, right in zip(spans, correct, strict=True)]
    assert TASK.steps("b3d2", response) == expected


@pytest.mark.parametrize(
    "variant, attempt, text, first_error",
    [
        ("local", RIGHT, RIGHT, None),
        ("continued", RIGHT, RIGHT, None),
        ("local", "3+b=e;d+e=b;b+2=d;", "3+b=e;d+e=b;b+2=d;", None),  # keeps the phrasing
        # The second value is wrong; local goes on from it, continued from the right one.
        ("local", "b+3=e;d+e=c;c+2=e;", "b+3=e;d+e=b;c+2=e;", 1),
        ("continued", "b+3=e;d+e=c;c+2=e;", "b+3=e;d+e=b;b+2=d;", 1),
        # Two errors: each is corrected where it stands.
        ("local", "b+3=1;1+d=5;5+2=9;", "b+3=e;1+d=e;5+2=7;", 0),
        ("continued", "b+3=1;1+d=5;5+2=9;", "b+3=e;e+d=b;b+2=d;", 0),
        # Left sides: the running total is lost, the term is lost, both; x stays left if it was.
        ("local", "b+3=e;7+d=4;4+2=6;", "b+3=e;e+d=b;4+2=6;", 1),
        ("local", "b+3=e;e+7=5;5+2=7;", "b+3=e;e+d=b;5+2=7;", 1),
        ("local", "b+3=e;d+7=4;4+2=6;", "b+3=e;d+e=b;4+2=6;", 1),
        # Right total of wrong operands: not endorsed.
        ("local", "b+3=e;c+f=b;b+2=d;", "b+3=e;e+d=b;b+2=d;", 1),
        # Missing and unreadable steps are written anew, from the corrected total.
        ("local", "b+3=1;", RIGHT, 0),
        ("continued", "b+3=e;", RIGHT, 1),
        ("local", "", RIGHT, 0),
        ("local", "nonsense", RIGHT, 0),
        ("local", "nonsense;e+d=b;b+2=d;", RIGHT, 0),
        # More steps than terms: the extra ones are dropped.
        ("local", RIGHT + "d+0=d;", RIGHT, None),
    ],
)
def test_critique(variant, attempt, text, first_error):
    critique = ChainSum(critic_variant=variant).critique("b3d2", attempt, None)
    assert (critique.text, critique.first_error) == (text, first_error)


@given(question_texts, responses)
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_judged(question, response):
    assert TASK.reward([question], [response])[0] in (0.0, 1.0)
    for step in TASK.steps(question, response):
        assert 0 <= step.start < step.end <= len(response)
    for variant in ("local", "continued"):
        critique = ChainSum(critic_variant=variant).critique(question, response, None)
        assert len(critique.text) == 18 and set(critique.text) <= set(DIGITS + "+=;")


@given(
    question_texts,
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.dictionaries(st.integers(0, 2), st.integers(1, 15)),
)
@settings(max_examples=300, deadline=None)
def test_critic_marks_exactly_the_errors(question, phrasing, errors):
    attempt = write(question, phrasing, errors)
    assert [step.correct for step in TASK.steps(question, attempt)] == [
        k not in errors for k in range(3)
    ]
    critique = TASK.critique(question, attempt, None)
    assert critique.first_error == min(errors, default=None)
    # Only the values of the wrong steps differ from the attempt: verbatim elsewhere.
    differing = [i for i in range(18) if critique.text[i] != attempt[i]]
    assert differing == [6 * k + 4 for k in sorted(errors)]


@given(question_texts, st.tuples(st.booleans(), st.booleans(), st.booleans()))
@settings(max_examples=100, deadline=None)
def test_right_attempts_are_reproduced_exactly(question, phrasing):
    attempt = write(question, phrasing)
    assert TASK.reward([question], [attempt]) == [1.0]
    for variant in ("local", "continued"):
        critique = ChainSum(critic_variant=variant).critique(question, attempt, None)
        assert (critique.text, critique.first_error) == (attempt, None)


@pytest.mark.parametrize("phrasing, share", [("other", 0.9), ("own", 0.1)])
def test_reference_phrasing(phrasing, share):
    task = ChainSum(reference_phrasing=phrasing)
    asked = [task.prompt("train", i).question for i in range(1000)]
    solutions = [task.reference(question) for question in asked]
    assert solutions == [task.prompt("train", i).solution for i in range(1000)]
    judged = [step for pair in zip(asked, solutions, strict=True) for step in judge(*pair)]
    assert len(judged) == 3000 and all(step.correct for step in judged)
    # Steps whose two operands are equal have no phrasing; the rest follow a binomial share of
    # standard deviation (0.9 * 0.1 / 2700)^0.5 = 0.006: within five of them.
    phrased = [step for step in judged if step.total != step.term]
    assert abs(sum(step.total_right for step in phrased) / len(phrased) - share) < 0.03


def test_options():
    task = load_task("chain_sum", critic_variant="continued", reference_phrasing="own")
    assert (task.name, task.critic_variant, task.reference_phrasing) == (
        "chain_sum",
        "continued",
        "own",
    )
    with pytest.raises(TaskError, match="did you mean 'chain_sum'"):
        load_task("chain-sum")
    with pytest.raises(TaskError, match="did you mean 'critic_variant'"):
        load_task("chain_sum", critic_varient="local")
    with pytest.raises(TaskError, match=r"critic.variant: 'global' .* local, continued"):
        load_task("chain_sum", critic_variant="global")
    with pytest.raises(TaskError, match="reference_phrasing: 'theirs'"):
        load_task("chain_sum", reference_phrasing="theirs")


def test_the_experiment_asks_as_the_base_was_taught():
    """chain_sum.toml is a valid configuration, and its teacher sees a hint where the author had."""
    with resources.files("fastsd.tasks").joinpath("chain_sum.toml").open("rb") as file:
        config = Config(**tomllib.load(file))
    assert (config.model.name, config.data.task) == ("chain_sum", "chain_sum")
    load_task(config.data.task, critic_variant=config.critic.variant, **config.data.task_options)
    (user_turn, _), *_ = Author(0).examples(1, random.Random(0), hinted=True)
    question, hint = user_turn[:4], user_turn[5:]
    for template in (config.prompt.reference_template, config.prompt.critique_template):
        assert template.format(question=question, feedback=hint) == user_turn


def test_base_path_is_in_the_package():
    assert base_path().is_dir() and (base_path() / "model.safetensors").is_file()
