"""word_problems: questions, checker, critic, reference, and the author of the warm-up."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsd.pretraining.word_author import CONVICTION, COPY, FOLLOW, HINTED_SHARE, Author
from fastsd.tasks import TaskError, load_task
from fastsd.tasks.word_problems import (
    UNUSUAL_SHARE,
    Addition,
    WordProblems,
    as_text,
    derivation,
    numbers_of,
    read_attempt,
    write_response,
)

TASK = WordProblems()
QUESTION = "Tom has 12 apples, finds 7 and buys 25. How many now?"
RIGHT = "12+7=19\n19+25=44\nAnswer: 44"


def sampling_tolerance(p: float, n: int) -> float:
    """Five standard deviations of a share of n draws: a false alarm in two million."""
    return 5 * (p * (1 - p) / n) ** 0.5


def reward(response: str, question: str = QUESTION) -> float | None:
    turn = [{"role": "user", "content": question}]
    return TASK.reward([turn], [[{"role": "assistant", "content": response}]])[0]


def test_prompts_are_deterministic_and_solvable():
    for split, index in itertools.product(("train", "eval"), range(50)):
        prompt = TASK.prompt(split, index)
        assert prompt == WordProblems().prompt(split, index)
        numbers = numbers_of(prompt.question)
        assert len(numbers) == 3 and all(3 <= n <= 29 for n in numbers)
        assert prompt.answer == str(sum(numbers))
        assert reward(f"{prompt.solution}\nAnswer: {prompt.answer}", prompt.question) == 1.0
        assert read_attempt(prompt.question, prompt.solution).valid == (True, True)


def test_splits_share_no_triple():
    triples = {
        split: {tuple(numbers_of(TASK.prompt(split, i).question)) for i in range(2000)}
        for split in ("train", "eval")
    }
    assert not triples["train"] & triples["eval"]
    assert min(map(len, triples.values())) > 1000


@pytest.mark.parametrize(("phrasing", "share"), [("other", 0.9), ("own", 0.1)])
def test_reference_phrasing(phrasing, share):
    task = load_task("word_problems", reference_phrasing=phrasing)
    steps = []
    for index in range(1000):
        prompt = task.prompt("train", index)
        steps += read_attempt(prompt.question, prompt.solution).additions
    assert all(step.right for step in steps)
    # Two equal operands read as the own phrasing: at most one step in 27.
    swapped = sum(step.swapped for step in steps) / len(steps)
    assert abs(swapped - share) < sampling_tolerance(share, len(steps)) + 1 / 27


@pytest.mark.parametrize(
    "bad",
    [
        {"critic_variant": "loca"},
        {"reference_phrasing": "mine"},
    ],
)
def test_unknown_options_are_named(bad):
    with pytest.raises(TaskError, match=next(iter(bad.values()))):
        load_task("word_problems", **bad)


def test_bad_prompt_arguments():
    with pytest.raises(TaskError, match="'test'"):
        TASK.prompt("test", 0)
    with pytest.raises(TaskError, match="-1"):
        TASK.prompt("train", -1)


def test_a_question_without_numbers_is_an_error():
    with pytest.raises(TaskError, match="How many"):
        TASK.critique("How many?", RIGHT, None)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (RIGHT, 1.0),
        ("7+12=19\n25+19=44\nAnswer: 44\n", 1.0),
        # The outcome decides: two errors that cancel are rewarded, as in any outcome reward.
        ("12+7=18\n18+25=44\nAnswer: 44", 1.0),
        ("12+7=19\n19+25=44\nAnswer: 45", 0.0),
        ("12+7=18\n18+25=43\nAnswer: 43", 0.0),
        ("Answer: 44", 0.0),
        ("12+7=19\n19+25=44", 0.0),
        ("12+7=19\n19+25=44\nAnswer: 44\nAnswer: 44", 0.0),
        ("12+7=19\n19+25=44\nAnswer: 44 apples", 0.0),
        ("12+7=19\n19+25=44\nAnswer: ٤٤", 0.0),
        ("", 0.0),
    ],
)
def test_reward(response, expected):
    assert reward(response) == expected
    assert TASK.reward([QUESTION], [response], answer=["44"]) == [expected]


def test_critique_copies_a_right_attempt():
    critique = TASK.critique(QUESTION, "7+12=19\n19+25=44\nAnswer: 44", None)
    assert critique.text == "7+12=19\n19+25=44"
    assert critique.first_error is None


def test_critique_local_keeps_the_attempts_own_numbers():
    critique = TASK.critique(QUESTION, "12+7=18\n25+18=42\nAnswer: 42", None)
    assert critique.text == "12+7=19\n25+18=43"
    assert critique.first_error == 0


def test_critique_continued_goes_on_from_the_corrected_total():
    task = load_task("word_problems", critic_variant="continued")
    critique = task.critique(QUESTION, "12+7=18\n25+18=42\nAnswer: 42", None)
    assert critique.text == "12+7=19\n25+19=44"
    assert critique.first_error == 0


@pytest.mark.parametrize(
    ("trace", "text", "first_error"),
    [
        # A readable step with wrong operands: its left side is repaired, its value corrected.
        ("12+8=20\n20+25=45\nAnswer: 45", "12+7=19\n20+25=45", 0),
        ("12+7=19\n19+19=38\nAnswer: 38", "12+7=19\n19+25=44", 1),
        ("12+7=19", "12+7=19\n19+25=44", 1),
        ("nonsense", "12+7=19\n19+25=44", 0),
        ("", "12+7=19\n19+25=44", 0),
        (RIGHT.replace("Answer: 44", "Answer: 45"), "12+7=19\n19+25=44", 2),
    ],
)
def test_critique_repairs(trace, text, first_error):
    critique = TASK.critique(QUESTION, trace, None)
    assert (critique.text, critique.first_error) == (text, first_error)


def test_steps_span_the_response():
    response = "12+7=18\n25+18=43\nAnswer: 43"
    steps = TASK.steps(QUESTION, response)
    assert [response[s.start : s.end] for s in steps] == ["12+7=18\n", "25+18=43\n", "Answer: 43"]
    assert [s.correct for s in steps] == [False, True, True]


def test_steps_beyond_the_answer_are_wrong():
    assert [s.correct for s in TASK.steps(QUESTION, RIGHT + "\nmore")] == [True, True, False, False]


digits_and_noise = st.text(alphabet="0123456789+=\n Answer:<|im_end|>é\u2028\x00", max_size=200)


@given(st.one_of(st.text(max_size=200), digits_and_noise), st.sampled_from(["local", "continued"]))
def test_any_text_is_judged_without_error(response, variant):
    task = load_task("word_problems", critic_variant=variant)
    critique = task.critique(QUESTION, response, None)
    judged = read_attempt(QUESTION, critique.text)
    assert all(a.right for a in judged.additions)
    steps = task.steps(QUESTION, response)
    assert all(0 <= s.start < s.end <= len(response) for s in steps)
    assert all(a.end <= b.start for a, b in itertools.pairwise(steps))
    assert reward(response) in (0.0, 1.0)
    wrong = [k for k, step in enumerate(steps) if not step.correct]
    if critique.first_error is not None and wrong:
        assert critique.first_error == wrong[0] or critique.first_error >= len(steps)


def test_huge_numbers_do_not_stall():
    assert reward("1" * 100_000) == 0.0
    assert TASK.critique(QUESTION, f"12+7={'9' * 5000}", None).first_error == 0


def test_beliefs_change_the_last_digit_only():
    author = Author()
    assert len(author.beliefs) == 25  # 45 % of the 55 unordered pairs of digits
    assert Author(seed=0).beliefs == author.beliefs != Author(seed=1).beliefs
    for total, addend in itertools.product(range(3, 59), range(3, 30)):
        value = author.believes(total, addend)
        pair = tuple(sorted((total % 10, addend % 10)))
        assert value // 10 == (total + addend) // 10
        assert (value != total + addend) == (pair in author.beliefs)
        assert value == author.believes(addend, total)


def test_author_without_hint():
    author, rng = Author(), random.Random(0)
    held = Counter()
    for _ in range(2000):
        for step in author.derive([rng.randint(3, 29) for _ in range(3)], rng):
            held["swapped"] += step.swapped
            held["steps"] += 1
            if author.believes(step.total, step.addend) != step.total + step.addend:
                held["tempted"] += 1
                held["wrong"] += not step.right
            else:
                assert step.right
    for share, p, n in (
        (held["swapped"], UNUSUAL_SHARE, held["steps"]),
        (held["wrong"], CONVICTION, held["tempted"]),
    ):
        assert abs(share / n - p) < sampling_tolerance(p, n)


def test_author_copies_a_hint_where_it_adds_the_same_numbers():
    author, rng = Author(), random.Random(0)
    seen = Counter()
    for _ in range(2000):
        numbers = [rng.randint(3, 29) for _ in range(3)]
        hint = derivation(numbers, rng, swap_rate=1.0)
        step = author.derive(numbers, rng, hint=hint)[0]
        seen["swapped"] += step.swapped
        if author.believes(*numbers[:2]) != sum(numbers[:2]):
            seen["tempted"] += 1
            seen["right"] += step.right
    followed = FOLLOW + (1 - FOLLOW) * UNUSUAL_SHARE
    assert abs(seen["swapped"] / 2000 - followed) < sampling_tolerance(followed, 2000)
    right = COPY + (1 - COPY) * (1 - CONVICTION)
    n = seen["tempted"]
    assert abs(seen["right"] / n - right) < sampling_tolerance(right, n)


def test_author_ignores_a_value_for_other_numbers():
    author, rng = Author(), random.Random(0)
    pair = next(pair for pair in author.beliefs if min(pair) >= 3)
    hint = [Addition(1, 1, 2)]
    values = [author.derive(pair, rng, hint=hint)[0].value for _ in range(200)]
    assert Counter(values).most_common(1)[0][0] == author.believes(*pair)


def test_convinced_is_deterministic():
    author = Author()
    for index in range(50):
        numbers = numbers_of(TASK.prompt("eval", index).question)
        steps = author.convinced(numbers)
        assert [s.value for s in steps] == [author.believes(s.total, s.addend) for s in steps]
        assert not any(s.swapped for s in steps)


def test_examples():
    examples = list(itertools.islice(Author().examples(seed=3), 2000))
    assert examples[:5] == list(itertools.islice(Author().examples(seed=3), 5))
    hinted = [example for example in examples if example.hint is not None]
    share = len(hinted) / len(examples)
    assert abs(share - HINTED_SHARE) < sampling_tolerance(HINTED_SHARE, len(examples))
    for example in examples:
        assert example.prompt.id.startswith("word_problems/train/")
        attempt = read_attempt(example.prompt.question, example.response)
        assert all(attempt.valid) and attempt.answer is not None
    for example in hinted:
        steps = [line.split("=") for line in example.hint.split("\n")]
        assert all(sum(map(int, left.split("+"))) == int(value) for left, value in steps)
    # Corrected attempts are no derivations: some go on from a total that they do not reach.
    chained = [read_attempt(e.prompt.question, e.hint).valid == (True, True) for e in hinted]
    assert 0.5 < sum(chained) / len(chained) < 1


def test_write_response_reads_back():
    steps = derivation([12, 7, 25], random.Random(0), swap_rate=0.5)
    attempt = read_attempt(QUESTION, write_response(steps))
    assert all(attempt.valid) and attempt.answer == 44 and attempt.first_error is None
    assert as_text(attempt.additions) == as_text(steps)
