"""Every class of invalid critique is found and counted; valid ones say where they first differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastsd.config.sections import CriticConfig, RewardConfig
from fastsd.critics.prompt import critic_messages
from fastsd.critics.validation import validate_all
from fastsd.rewards.functions import exact_reward, load_reward
from fastsd.types import Prompt, Rollout

ATTEMPT = "Step 1: 1+2=3\nStep 2: 3+3=7\nStep 3: 7+1=8\nAnswer: 8"
FIXED = "Step 1: 1+2=3\nStep 2: 3+3=6\nStep 3: 6+1=7\nAnswer: 7"
PROMPT = Prompt("p", ({"role": "user", "content": "1+2+3+1?"},), answer="7")


def rollout_of(text=ATTEMPT, reward: float | None = 0.0, prompt=PROMPT) -> Rollout:
    return Rollout(prompt, 0, (1,), (0.0,), text, False, reward)


def validated(text, rollout=None, reward=exact_reward, tokenizer=None, **config):
    rollout = rollout or rollout_of()
    (critique,) = validate_all([text], [rollout], CriticConfig(**config), reward, tokenizer)
    return critique


def test_a_correction_in_place_is_valid_and_says_where():
    critique = validated(FIXED)
    assert critique.text == FIXED and critique.problem is None
    assert critique.first_error == 1 and critique.prefix_share == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "first_error", "share"),
    [
        (ATTEMPT.replace("8", "9"), 2, 2 / 3),
        ("1. 1+2=3\n2.  3+3=7\n3.   7+1=8\nAnswer: 8", None, 1),
        ("<step_1>1+2=3</step_1><step_2>\n3+3=7\n</step_2> <step_3>7+1=8", None, 1),
        (ATTEMPT.replace("Answer", "Step 4: hence 8\nAnswer"), None, 1),
        ("Step 1: 1+2=3\nStep 2: thus\nStep 3: 3+3=7\nStep 4: 7+1=8", 1, 1 / 3),
        ("Step 1: 1+2=3", 1, 1 / 3),
        ("Step 1: so\nStep 2: 3+3=7", 0, 0),
    ],
)
def test_the_first_divergent_step(text, first_error, share):
    critique = validated(text, reward=None)
    assert (critique.text, critique.problem) == (text, None)
    assert critique.first_error == first_error and critique.prefix_share == pytest.approx(share)


def test_white_space_within_a_step_does_not_count():
    rollout = rollout_of("Step 1: so  1 +\n2 = 3\nAnswer: 7")
    assert validated("<step_1>\tso 1 + 2\r\n= 3 </step_1> Answer: 7", rollout).prefix_share == 1
    assert validated("Step 1: so 1+2 = 3\nAnswer: 7", rollout).prefix_share == 0


@pytest.mark.parametrize(
    ("text", "first_error"),
    [
        (ATTEMPT, None),
        # The wrong step is quoted, then put right in a step of its own ...
        ("Step 1: 1+2=3\nStep 2: 3+3=7\nStep 3: No, 3+3=6\nStep 4: 6+1=7\nAnswer: 7", 1),
        # ... or within it.
        ("Step 1: 1+2=3\nStep 2: 3+3=7 is wrong: 6\nStep 3: 6+1=7\nAnswer: 7", 1),
        (ATTEMPT.replace("Answer: 8", "Step 4: No, 7\nAnswer: 7"), 2),
        ("Step 1: so\nAnswer: 7", 0),
    ],
)
def test_the_wrong_step_under_full_quoting(text, first_error):
    critique = validated(text, reward=None, quoting="full")
    assert critique.problem is None and critique.first_error == first_error


def test_without_quoting_no_steps_are_compared():
    critique = validated("The second sum is off.\n<answer>7</answer>", quoting="none")
    assert critique.text and (critique.first_error, critique.prefix_share) == (None, None)
    assert validated("It is right.\nAnswer: 8", quoting="none").problem == "wrong_answer"
    assert validated("Answer: 7", rollout_of("Answer: 8"), quoting="none").problem is None


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty(text):
    assert validated(text).problem == "empty" and validated(text).text is None


@pytest.mark.parametrize("quoting", ["verbatim", "full"])
def test_unparsed_where_either_has_no_steps(quoting):
    assert validated("Answer: 7", quoting=quoting).problem == "unparsed"
    assert validated(FIXED, rollout_of(""), quoting=quoting).problem == "unparsed"


def test_a_right_attempt_must_be_repeated():
    right = rollout_of(FIXED, reward=1.0)
    other = "Step 1: 1+2=3\nStep 2: 3+1=4\nStep 3: 4+3=7\nAnswer: 7"
    critique = validated(other, right)
    assert (critique.text, critique.problem, critique.first_error) == (None, "not_verbatim", 1)
    assert critique.prefix_share == pytest.approx(1 / 3)
    assert validated(FIXED, right).prefix_share == 1
    assert validated(other, right, min_verbatim=0.33).problem is None
    for reward in (0.0, 0.9, None):
        assert validated(other, replace(right, reward=reward)).problem is None
    for quoting in ("full", "none"):
        assert validated(other, right, quoting=quoting).problem is None


def test_a_wrong_final_answer():
    critique = validated(FIXED.replace("Answer: 7", "Answer: 70"))
    assert (critique.text, critique.problem) == (None, "wrong_answer")


def test_an_answer_that_cannot_be_judged_is_not_wrong():
    wrong = FIXED.replace("Answer: 7", "Answer: 70")
    unknown = rollout_of(prompt=replace(PROMPT, answer=None))
    assert validated(wrong, unknown).problem is None
    assert validated(wrong, reward=lambda completions: [None] * len(completions)).problem is None
    assert validated(wrong, reward=None).problem is None
    assert validated(wrong, reward=lambda completions: [0.5] * len(completions)).text is None


def test_answers_are_scored_at_once_and_only_where_they_count():
    calls = []

    def reward(prompts, completions, completion_ids, answer):
        calls.append([c[-1]["content"] for c in completions])
        assert len(completion_ids) == len(answer) == len(completions)
        return [1.0] * len(completions)

    unknown = rollout_of(prompt=replace(PROMPT, answer=None))
    rollouts = [rollout_of(), unknown, rollout_of(), rollout_of()]
    texts = [FIXED, FIXED, "", FIXED + " "]
    critiques = validate_all(texts, rollouts, CriticConfig(), reward)
    assert calls == [[FIXED, FIXED + " "]]
    assert [critique.problem for critique in critiques] == [None, None, "empty", None]
    assert [rollout.reward for rollout in rollouts] == [0.0] * 4


def test_hostile_answers_end_in_the_killable_workers(tmp_path):
    reward = load_reward(RewardConfig(function="math", timeout_s=1.0), None)
    target = tmp_path / "made"
    texts = [
        f'Step 1: a\nAnswer: __import__("os").system("touch {target}")',
        "Step 1: a\nAnswer: 9^{9^{9^{9^{9}}}}",
        FIXED,
    ]
    critiques = validate_all(texts, [rollout_of()] * 3, CriticConfig(), reward)
    assert [c.problem for c in critiques] == ["wrong_answer", "wrong_answer", None]
    assert not target.exists()


def test_special_tokens_are_refused_and_never_cleaned(tmp_path_factory):
    from tiny_models import build_tiny_qwen3
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(Path(build_tiny_qwen3(folder)))
    for token in ("<|im_end|>", "<|endoftext|>", "<think>", "<tool_call>"):
        critique = validated(FIXED.replace("Step 3", token), tokenizer=tokenizer)
        assert (critique.text, critique.problem) == (None, "special_tokens")
    for harmless in ("<|im_end", "< |im_end|>", "<step_1>"):
        text = FIXED.replace("6+1=7\n", f"6+1=7 {harmless.replace('<step_1>', '<b>')}\n")
        assert validated(text, tokenizer=tokenizer).text == text


def test_a_critique_that_copies_the_lines_of_the_request_is_none():
    request = critic_messages(rollout_of(), CriticConfig())[-1]["content"]
    mark = next(line for line in request.splitlines() if "begin" in line)
    assert validated(f"{mark}\n{FIXED}").problem == "copied_prompt"
    assert validated(f"{FIXED}\n{mark.replace('begin', 'end')}").problem == "copied_prompt"
    # An attempt that holds such a line may be repeated.
    assert validated(f"{mark}\n{FIXED}", rollout_of(f"{mark}\n{ATTEMPT}")).text is not None
