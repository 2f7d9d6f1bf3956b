"""reasoning_gym: questions, splits, worked solutions, scoring in processes, hostile answers."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fastsd.config.sections import RewardConfig
from fastsd.rewards.functions import load_reward, score_rollouts
from fastsd.tasks import TaskError, gym, gym_worker, load_task
from fastsd.tasks.answers import extract_answer
from fastsd.tasks.gym import GymReward, ReasoningGym
from fastsd.types import Prompt, Rollout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra `data`"
)
TIMEOUT_S = 0.6


@pytest.fixture(scope="module", autouse=True)
def ended_workers():
    yield
    gym.workers().close()


def rewards(task: ReasoningGym, prompt: Prompt, *answers: str, timeout_s: float = TIMEOUT_S):
    reward = load_reward(RewardConfig(function="task", timeout_s=timeout_s), task)
    texts = [f"Hm.\n<answer>{answer}</answer>" for answer in answers]
    return score_rollouts(reward, [Rollout(prompt, 0, (), (), text, False) for text in texts])


def test_questions_are_deterministic_and_their_answers_right():
    task = load_task("reasoning_gym", dataset="gsm_symbolic")
    prompts = [task.prompt(split, i) for split in ("train", "eval") for i in (0, 1, 10**9)]
    assert [ReasoningGym("gsm_symbolic").prompt("train", i) for i in (0, 1)] == prompts[:2]
    assert ReasoningGym("gsm_symbolic", seed=1).prompt("train", 0) != prompts[0]
    assert len({p.id for p in prompts}) == len({p.question for p in prompts}) == len(prompts)
    assert all(p.question.endswith(f"\n\n{gym.INSTRUCTION}") for p in prompts)
    assert not ReasoningGym("gcd", instruction="").prompt("eval", 0).question.endswith("\n")
    for prompt in prompts:
        number = float(prompt.answer)
        assert rewards(task, prompt, prompt.answer, str(number + 1)) == [1.0, 0.0]


@pytest.mark.slow
def test_another_process_asks_the_same_questions():
    # Of isomorphic_strings, whose questions follow the order of a set.
    code = (
        "from fastsd.tasks.gym import ReasoningGym as R;"
        "print([R('isomorphic_strings').prompt('train', i).question for i in range(3)])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-P", "-c", code]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    task = ReasoningGym("isomorphic_strings")
    assert out.stdout.strip() == str([task.prompt("train", i).question for i in range(3)])


@pytest.mark.parametrize(
    ("dataset", "config"),
    [
        ("gsm_symbolic", {}),
        ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    ],
)
def test_splits_share_no_question(dataset, config):
    task = ReasoningGym(dataset, config=config)
    train = {task.prompt("train", i).question for i in range(300)}
    held_out = {task.prompt("eval", i).question for i in range(100)}
    assert not train & held_out
    assert len(train) > 100 and len(held_out) > 20


def test_a_dataset_with_one_question_has_no_second_split():
    def both_splits():
        task = ReasoningGym("count_bits", config={"min_n": 5, "max_n": 5})
        task.prompt("eval", 0)

    with pytest.raises(TaskError, match="none of 64 draws"):
        both_splits()


def test_worked_solutions():
    task = ReasoningGym("gsm_symbolic")
    for index in range(100):
        prompt = task.prompt("train", index)
        assert prompt.solution is not None and prompt.answer is not None
        assert "####" not in prompt.solution
        assert prompt.solution.count("\n") >= 1
        assert float(extract_answer(prompt.solution)) == float(prompt.answer)
    assert ReasoningGym("gcd").prompt("train", 0).solution is None


def test_a_long_answer_is_not_looked_at():
    task = ReasoningGym("gsm_symbolic")
    prompt = task.prompt("train", 0)
    # The scorer takes the first number.
    answers = [prompt.answer + " x" * 9_000, prompt.answer + " x" * 10_000]
    assert rewards(task, prompt, *answers) == [1.0, 0.0]


def test_only_an_exact_one_counts():
    task = ReasoningGym("string_insertion")
    prompt = task.prompt("train", 0)
    assert prompt.answer is not None
    # The scorer gives 0.1 for the right answer as a Python list.
    assert rewards(task, prompt, prompt.answer, str(list(prompt.answer)), "") == [1.0, 0.0, 0.0]
    for score, exact in [(1, True), (1.0, True), (0.99, False), ("1.0", False), (None, False)]:
        assert gym_worker.is_exactly_one(score) is exact


@pytest.mark.parametrize("dataset", ["bitwise_arithmetic", "number_sorting"])
def test_scorers_may_evaluate_what_is_their_own(dataset):
    task = ReasoningGym(dataset)
    prompt = task.prompt("train", 0)
    assert rewards(task, prompt, prompt.answer, "0x1", "['1']") == [1.0, 0.0, 0.0]


def test_formulas_are_scored():
    for dataset in ("puzzle24", "countdown", "polynomial_multiplication", "simple_integration"):
        task = ReasoningGym(dataset)
        prompt = task.prompt("train", 0)
        # The third is right too, if it is evaluated as Python.
        variants = [prompt.answer, f"({prompt.answer} )", f"{prompt.answer} + len('')", "x.args"]
        assert rewards(task, prompt, *variants, timeout_s=2.0) == [1.0, 1.0, 0.0, 0.0], dataset


@pytest.mark.parametrize("text", ["3*(x + 2)**2/4 - 1.5", "exp(2*x)*sin(x) + C", "5!^2", ".5+2."])
def test_formula(text):
    assert gym_worker.FORMULA.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    ["open(1)", "x.real", "1.real", "__import__", "x_", "[1]", "'a'", "lambda x: 1", "a=1", "x;y",
     "eval(1)", "sinx", "sqrt.a", "x2", "a\x00b", "\u0661", "{1}", "9" * 10**6 + "'"],
)  # fmt: skip
def test_no_formula(text):
    start = time.perf_counter()
    assert not gym_worker.FORMULA.fullmatch(text)
    assert time.perf_counter() - start < 1


# Those that hand answers to eval or parse_expr first, then some that parse or search.
DATASETS = (
    "string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "number_sorting",
    "bitwise_arithmetic", "simple_integration", "intermediate_integration",
    "polynomial_multiplication", "puzzle24", "countdown", "gsm_symbolic", "boxnet", "graph_color",
    "sudoku", "rubiks_cube", "propositional_logic",
)  # fmt: skip
HOSTILE = [
    "9**9**9**9", "9" * 10**7, "9" * 19_000, "[" * 19_000, "(" * 19_000, "{" * 500, "-" * 19_000,
    "1\x002", "\ud800", "[1]*10**10", "10**10**10", "factorial(10**9)", "{'a': 1", "1" + "!" * 9,
    "exit()", "(lambda f: f(f))(lambda f: f(f))", "0x" + "f" * 10_000, "NaN", "\n" * 9_000,
]  # fmt: skip


@pytest.mark.parametrize("dataset", DATASETS)
def test_hostile_answers(dataset, tmp_path):
    target = tmp_path / "made"
    code = f'__import__("os").system("touch {target}")'
    shapes = ["{}", "[{}]", "x + {}", "str({})", '["{}"]', "1+{}*0", '{{"a": {}}}']
    texts = [shape.format(code) for shape in shapes]
    texts += [f"open({str(target)!r}, 'w')", f"[open({str(target)!r}, 'w').close()]"]
    task = ReasoningGym(dataset)
    prompt = task.prompt("train", 0)
    assert rewards(task, prompt, *texts) == [0.0] * len(texts)
    start = time.perf_counter()
    assert rewards(task, prompt, *HOSTILE) == [0.0] * len(HOSTILE)
    # The promise for N answers on two workers, and a second for a machine that others use too.
    assert time.perf_counter() - start < len(HOSTILE) / 2 * TIMEOUT_S + 1
    assert not target.exists()
    assert "reasoning_gym" not in sys.modules, "the package belongs into the workers"


def test_a_slow_answer_is_killed_in_time_and_counted():
    task = ReasoningGym("puzzle24")
    prompt = task.prompt("train", 0)
    reward = task.reward_within(TIMEOUT_S)
    assert isinstance(reward, GymReward)
    columns = {name: [value] for name, value in prompt.columns.items()}
    start = time.perf_counter()
    assert reward([prompt.question], ["9**9**9**9"], **columns) == [0.0]
    assert TIMEOUT_S * 0.8 < time.perf_counter() - start < TIMEOUT_S + 1
    assert reward.timeouts == 1


@pytest.mark.slow
def test_a_dead_worker_scores_zero_and_is_replaced():
    task = ReasoningGym("gcd")
    prompt = task.prompt("train", 0)
    pool = gym.workers()
    for _ in range(2):
        worker = pool._idle.get()
        os.kill(worker._process.pid, signal.SIGKILL)
        pool._idle.put(worker)
    assert rewards(task, prompt, prompt.answer, prompt.answer) == [0.0, 0.0]
    assert rewards(task, prompt, prompt.answer, prompt.answer) == [1.0, 1.0]


def test_another_question_than_the_one_asked_is_an_error():
    task = ReasoningGym("gcd")
    prompts = [task.prompt("train", i) for i in (0, 1)]
    swapped = Prompt("x", prompts[0].messages, columns=prompts[1].columns)
    with pytest.raises(TaskError, match="gcd makes another question.*same version"):
        rewards(task, swapped, "1")
    with pytest.raises(TaskError, match="own questions only.*dataset_index"):
        task.reward(["a"], ["b"], dataset_seed=[None], dataset_index=[0])


def test_no_critic_and_no_steps():
    task = ReasoningGym("gcd")
    assert task.has_rules is False
    with pytest.raises(TaskError, match="critic.kind to local, server or replay"):
        task.critique("q", "t", None)
    assert task.steps("q", "1. a") == []
    assert task.answer("So <answer>4</answer>") == "4"
    assert task.answer("<answer></answer>") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"task_options.dataset: '' names no dataset.*\"gsm_symbolic\""),
        ({"dataset": "gsm_symbolc"}, "no dataset 'gsm_symbolc'; did you mean 'gsm_symbolic'"),
        ({"dataset": 3}, "task_options.dataset: 3 names no dataset"),
        ({"dataset": "codeio"}, "executes program snippets"),
        ({"datset": "gcd"}, "no option 'datset'; did you mean 'dataset'"),
        ({"dataset": "gcd", "config": {"min_nubers": 1}}, "did you mean 'min_numbers'"),
        ({"dataset": "gcd", "config": {"seed": 1}}, "has no field 'seed'"),
        ({"dataset": "gcd", "config": {"min_numbers": 0}}, "dataset gcd: AssertionError"),
        ({"dataset": "gcd", "config": [1]}, "config: .1. is not a table"),
        ({"dataset": "gcd", "config": {"min_numbers": time}}, "not JSON serializable"),
        ({"dataset": "gcd", "seed": "0"}, "seed: '0' is not a whole number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TaskError, match=message):
        load_task("reasoning_gym", **options)


def test_bad_questions():
    task = ReasoningGym("gcd")
    with pytest.raises(TaskError, match="split: 'test'"):
        task.prompt("test", 0)
    with pytest.raises(TaskError, match="index -1"):
        task.prompt("train", -1)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=re.escape("pip install 'fastsd[data]'")):
        ReasoningGym("gcd")


def test_workers_get_no_keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "planted")
    environment = gym.workers.__wrapped__()._environment
    assert environment is not None and "planted" not in environment.values()
    assert environment["PYTHONHASHSEED"] == "0"
