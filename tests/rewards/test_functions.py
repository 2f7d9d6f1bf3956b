"""Rewards: extraction, exactness, hostile answers, hard kills, users' functions."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fastsd.config.sections import RewardConfig
from fastsd.errors import FastsdError
from fastsd.rewards.functions import MathReward, exact_reward, load_reward, score_rollouts
from fastsd.tasks.answers import extract_answer
from fastsd.types import Prompt, Rollout


def rollout(text, answer="42", **columns):
    prompt = Prompt(
        id="p", messages=({"role": "user", "content": "q"},), answer=answer, columns=columns
    )
    return Rollout(prompt, 0, (1, 2, 3), (-0.1, -0.2, -0.3), text, False)


def score(reward, text, answer):
    return score_rollouts(reward, [rollout(text, answer)])[0]


@pytest.fixture(scope="module")
def maths():
    reward = load_reward(RewardConfig(function="math"), None)
    assert score(reward, "1.0", "1") == 1.0  # the workers' start is not part of any timing below
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("  whole \n", "whole"),
        ("Answer: 3\nAnswer: 42\nBye", "42"),
        ("**Final Answer:** **42**.", "42"),
        ("answer :\n\n 42", "42"),
        (r"so \boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed {\{2\}}", r"\{2\}"),
        (r"Answer: $\boxed{42}$.", "42"),
        (r"\boxed{1}. Answer: 2", "2"),
        ("<answer> 42 </answer> done", "42"),
        ("<Answer>\n42", "42"),
        ("<answer>\u0130\u0130 1</ANSWER>x", "\u0130\u0130 1"),
        (r"\boxed{\frac{1}{2", r"\frac{1}{2"),
        ("", ""),
        ("the answer is 42", "the answer is 42"),
    ],
)
def test_extract_answer(text, found):
    assert extract_answer(text) == found


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 150_000,
        "{" * 10**6,
        "Answer:" * 150_000,
        "answer" + " " * 10**6,
        "<answer>" * 9,
    ],
)
def test_extraction_of_huge_text_is_linear(text):
    start = time.perf_counter()
    extract_answer(text)
    exact_reward([], [text], ["1"])
    # Quadratic work on 10^6 characters would take minutes.
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("Answer: Blue  Whale.", "blue whale", 1.0),
        ("Answer: $7$", "7", 1.0),
        ("Answer: \uff14\uff12", "42", 1.0),
        ("42.0", "42", 0.0),
        ("It is 42", "42", 0.0),
        ("Answer: ", "42", 0.0),
        ("**", "*", 0.0),
    ],
)
def test_exact(text, answer, reward):
    assert score(load_reward(RewardConfig(function="exact"), None), text, answer) == reward


RIGHT = [
    ("42.0", "42"), (r"\frac12", "0.5"), ("1/2", "0.5"), ("x=5", "5"), ("5", "x = 5"),
    (r"\{2,1\}", r"\{1,2\}"), ("(x-1)(x+1)", "x^2-1"), (r"50\%", "0.5"), ("1,000", "1000"),
    (r"2\sqrt2", r"$\sqrt{8}$"), ("4i+3", "3+4i"), (r"\frac12", r"\int_0^1 x dx"), ("120", "5!"),
    (r"\(42\)", "42"), ("$42$", r"\boxed{42}"), (r"12 \text{ cm}", "12"), ("Paris", "Paris"),
    ("90^\\circ", "90"), (r"\log_2 8", "3"), ("0.333333333", "1/3"),
]  # fmt: skip
WRONG = [
    ("43", "42"), ("$42$ or $43$", "42"), ("42, 43", "42"), ("0.9999999", "1"), ("Piras", "Paris"),
    ("on", "no"), ("", "42"), ("NaN", "42"), ("(1,2]", "(1,2)"), ("-42", "42"), ("4 2", "42"),
    ("0.333", "1/3"), ("10^{-10}", "0"), ("True", "1"), (r"\text{42}", "43"),
]  # fmt: skip


def test_math_verdicts(maths):
    rewards = score_rollouts(maths, [rollout(rf"\boxed{{{t}}}", gold) for t, gold in RIGHT])
    assert [pair for pair, reward in zip(RIGHT, rewards, strict=True) if reward != 1.0] == []
    rewards = score_rollouts(maths, [rollout(rf"\boxed{{{t}}}", gold) for t, gold in WRONG])
    assert [pair for pair, reward in zip(WRONG, rewards, strict=True) if reward != 0.0] == []


HOSTILE = [
    "9**9**9**9", "9^{9^{9^{9^{9}}}}", "100000000!", "1!!!!!!!!", "{" * 1900, "(" * 1900,
    r"\sqrt{" * 300, r"\frac{1}{" * 200 + "1" + "}" * 200, "x" * 2000, "1+" * 999 + "1",
    "x" * 10**6, r"\sum_{n=1}^{10^{12}} n!", r"\int_0^1 e^{x^{x^{x}}} dx", "\u0661\u0662", "\ud800",
    "\x00", "\n" * 50, r"\input{/etc/passwd}", "$" * 1999, "\\" * 1999, "10^{1000000000}",
    r"\binom{10^9}{5\cdot10^8}",
]  # fmt: skip


def test_hostile_answers_score_zero_in_time(maths):
    for text in HOSTILE:
        start = time.perf_counter()
        reward = score(maths, text, "7")
        seconds = time.perf_counter() - start
        assert reward == 0.0, text[:40]
        # 0.9 s for the child; the rest is for the kill on a machine that others use too.
        assert seconds < maths.timeout_s + 0.5, (text[:40], seconds)


def test_answers_are_never_evaluated(maths, tmp_path):
    target = tmp_path / "pwned"
    code = f"__import__('os').system('touch {target}')"
    shapes = ["{}", "${}$", r"\text{{{}}}", r"\operatorname{{{}}}", "1.5+{}", "{{{}}}", "x_{{{}}}"]
    texts = [shape.format(code) for shape in shapes]
    texts += [f"open('{target}','w')", f"exec(\"open('{target}','w')\")", f"[{code}][0]"]
    assert score_rollouts(maths, [rollout(t, "0") for t in texts]) == [0.0] * len(texts)
    assert score_rollouts(maths, [rollout("0.5", t) for t in texts]) == [0.0] * len(texts)
    assert not target.exists()


def test_worker_refuses_whatever_the_libraries_try(tmp_path):
    from fastsd.runtime import sandbox

    def attempt(action):
        child = os.fork()
        if child == 0:
            import sys

            sys.addaudithook(sandbox.refuse)
            try:
                action()
            except PermissionError:
                os._exit(7)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    target = tmp_path / "file"
    assert attempt(lambda: None) == 0
    assert attempt(lambda: eval("1+1")) == 7
    assert attempt(lambda: exec("x = 1")) == 7
    assert attempt(lambda: os.system("true")) == 7
    assert attempt(lambda: os.open(target, os.O_WRONLY | os.O_CREAT)) == 7
    assert attempt(lambda: target.write_text("x")) == 7
    assert attempt(lambda: os.kill(os.getppid(), 0)) == 7
    assert not target.exists()


def test_a_slow_answer_is_killed_and_its_neighbours_are_scored(maths):
    before = maths.timeouts
    start = time.perf_counter()
    texts = ["100000000!", "42.0", "100000000!", "84/2", "43"]
    assert score_rollouts(maths, [rollout(t) for t in texts]) == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert maths.timeouts == before + 2
    # The promise for N answers on two workers, rounded up: 3 * timeout_s.
    assert time.perf_counter() - start < 3 * maths.timeout_s


def test_a_dead_or_wedged_worker_is_replaced(monkeypatch):
    monkeypatch.setattr("fastsd.rewards.functions.PATIENCE_S", 0.5)
    reward = MathReward(timeout_s=0.5)
    assert score(reward, "42.0", "42") == 1.0
    pids = []
    for _ in range(2):
        worker = reward.workers._idle.get()
        assert worker.ask({"gold": "42", "answer": "42.0"}, 10.0) == "right"  # it has started
        pids.append(worker._process.pid)
        worker._process.send_signal(signal.SIGSTOP if len(pids) == 1 else signal.SIGKILL)
        reward.workers._idle.put(worker)
    assert score_rollouts(reward, [rollout("42.0"), rollout("43.0")]) == [0.0, 0.0]
    assert score_rollouts(reward, [rollout("42.0"), rollout("43.0")]) == [1.0, 0.0]
    reward.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_start_lazily_and_close():
    reward = MathReward(timeout_s=1.0)
    assert score_rollouts(reward, [rollout("Answer: 42"), rollout("")]) == [1.0, 0.0]
    assert reward.workers._threads is None
    assert score(reward, "42.0", "42") == 1.0
    worker = reward.workers._idle.get()
    reward.workers._idle.put(worker)
    modules = open(f"/proc/{worker._process.pid}/maps").read()
    assert "libtorch" not in modules
    reward.close()
    assert worker._process.poll() is not None


@pytest.mark.parametrize("function", ["exact", "math"])
def test_missing_answer_is_an_error(function):
    reward = load_reward(RewardConfig(function=function), None)
    with pytest.raises(FastsdError, match=f'"{function}" needs an answer.*prompt 1.*data.columns'):
        score_rollouts(reward, [rollout("a"), rollout("b", answer=None)])


def user(name):
    return load_reward(RewardConfig(function=f"tests.helpers.reward_functions:{name}"), None)


def test_user_function_gets_columns_and_may_give_no_signal():
    rollouts = [rollout("ab", level=10), rollout("abc", level=20), rollout("x", other=1)]
    assert score_rollouts(user("lengths"), rollouts) == [15.0, 26.0, None]
    assert score_rollouts(user("only_completions"), rollouts) == [1.0, 1.0, 1.0]
    assert score_rollouts(user("explodes"), []) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("explodes", "tests.helpers.reward_functions:explodes raised ZeroDivisionError"),
        ("one_too_many", "returned 3 rewards for 2 completions"),
        ("text", "returned '1.0' for completion 0"),
        ("not_a_number", "returned nan for completion 0.*None for no signal"),
        ("not_a_list", "returned a float, not a list"),
    ],
)
def test_bad_user_functions(name, message):
    with pytest.raises(FastsdError, match=message):
        score_rollouts(user(name), [rollout("a"), rollout("b")])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("task", "set data.task"),
        ("maths", 'did you mean "math"'),
        ("tests.helpers.reward_functions:nothing", "AttributeError"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("tests.helpers.reward_functions:NOT_CALLABLE", "is a int, not callable"),
    ],
)
def test_bad_names(function, message):
    with pytest.raises(FastsdError, match=message):
        load_reward(RewardConfig(function=function), None)


def test_column_that_clashes():
    with pytest.raises(FastsdError, match="'completions' has a name"):
        score_rollouts(exact_reward, [rollout("a", completions=3)])


def test_task_reward():
    from fastsd.tasks import load_task

    task = load_task("chain_sum")
    reward = load_reward(RewardConfig(function="task"), task)
    prompt = task.prompt("train", 0)
    good = Rollout(prompt, 0, (), (), prompt.solution, False)
    bad = Rollout(prompt, 1, (), (), "nonsense", False)
    assert score_rollouts(reward, [good, bad]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("judge", "verdict"),
    [
        (lambda: True, "right"),
        (lambda: False, "wrong"),
        (lambda: 1 / 0, "wrong"),
        (lambda: bytearray(3 << 30) is not None, "wrong"),
        (lambda: eval("True"), "wrong"),
        (lambda: os._exit(3), "wrong"),
        (lambda: time.sleep(60), "timeout"),
    ],
)
def test_a_judge_is_limited(judge, verdict):
    from fastsd.runtime import sandbox

    start = time.perf_counter()
    assert sandbox.check(judge, 0.3) == verdict
    assert time.perf_counter() - start < 2


def test_limits_that_outlast_the_worker():
    import resource

    from fastsd.runtime import sandbox

    def judge():
        limits = {
            name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in expected
        }
        return limits == expected

    expected = {"NPROC": (0, 0), "FSIZE": (0, 0), "CORE": (0, 0), "CPU": (2, 2)}
    assert sandbox.check(judge, 0.9) == "right"
