"""Rewards: rollout -> 1.0 (right), 0.0 (wrong) or None (no signal), by functions in TRL's shape.

    reward(prompts, completions, completion_ids, **columns) -> list[float | None]

`load_reward` gives the task's own check, exact match, math-verify, or a user's function;
`score_rollouts` calls any of them. The built-in ones compare the final answer of the response,
as fastsd.tasks.answers finds it.

Answer text is untrusted. It is only ever compared as a string, or parsed as LaTeX by math-verify
in another process (fastsd/rewards/math_worker.py), which never imports torch and forks a child per
answer. A child gets 90 % of reward.timeout_s and then SIGKILL; the rest of the time pays for the
kill and the next fork, so that N answers on two workers take at most N / 2 * timeout_s after the
workers' start (about 2 s, once, at the first answer that needs them). A worker that itself stops
answering, which no answer can bring about, is replaced after timeout_s + 10 s and scores 0. Tasks
whose answers take more than a comparison to judge are judged in such processes too (fastsd/tasks/).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import numbers
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsd.config.sections import RewardConfig
from fastsd.errors import FastsdError
from fastsd.runtime.workers import CHILD_SHARE, WorkerPool
from fastsd.tasks.answers import completion_text, extract_answer, folded
from fastsd.types import Reward, Rollout, Task

MAX_ANSWER_CHARACTERS = 2000
PATIENCE_S = 10.0
# Added to a group's standard deviation, as in TRL's GRPO.
EPSILON = 1e-4
_BUILT_IN = ("task", "exact", "math")
_WORDS = re.compile(r"[^\W\d_]{2,}([ '-][^\W\d_]+)*")


def load_reward(config: RewardConfig, task: Task | None) -> Reward:
    """The reward function that reward.function names. Its `__name__` is that name.

    Raises FastsdError when there is no task for "task", or when the module or function of
    "module:function" cannot be imported.
    """
    name = config.function
    if name == "task":
        if task is None:
            raise FastsdError('reward.function = "task" needs a task: set data.task')
        # Only a task that judges answers in processes of its own has a limit to set.
        within = getattr(task, "reward_within", None)
        return task.reward if within is None else within(config.timeout_s)
    if name == "exact":
        return exact_reward
    if name == "math":
        return MathReward(config.timeout_s)
    if ":" in name:
        return _import_function(name)
    near = difflib.get_close_matches(name, _BUILT_IN, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise FastsdError(
        f'reward.function = "{name}" is none of task, exact, math or module:function{hint}'
    )


def score_rollouts(reward: Reward, rollouts: Sequence[Rollout]) -> list[float | None]:
    """Call a reward function on rollouts; one number or None each.

    The function gets message lists: prompts, and completions of one assistant turn; and each
    column (answer, solution and the prompts' own) as a list, None where a prompt lacks it. Like
    completion_ids, columns are left out where its signature does not take them.
    Raises FastsdError naming the function when it raises or returns anything else.
    """
    if not rollouts:
        return []
    name = _name(reward)
    arguments = _accepted(reward, _arguments(rollouts))
    try:
        rewards = reward(**arguments)
    except FastsdError:
        raise
    except Exception as error:
        raise FastsdError(
            f"reward function {name} raised {type(error).__name__}: {error}"
        ) from error
    return _checked(rewards, len(rollouts), name)


def exact_reward(
    prompts: list, completions: list, answer: list[str | None], **columns: Any
) -> list[float | None]:
    """1.0 where the final answer is the answer: NFKC, spaces and case set aside, else 0.0."""
    golds = [folded(gold) for gold in _required(answer, "exact")]
    found = [folded(extract_answer(completion_text(completion))) for completion in completions]
    return [float(f != "" and f == gold) for f, gold in zip(found, golds, strict=True)]


class MathReward:
    """math-verify in worker processes that are started at the first need and kept.

    1.0 only where math-verify says exactly True (or the strings are equal); 0.0 for wrong, over
    2,000 characters, unparsable or too slow (`timeouts` counts the last).
    """

    __name__ = "math"

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.timeouts = 0
        if importlib.util.find_spec("math_verify") is None:
            raise FastsdError('reward.function = "math" needs: pip install math-verify')
        script = Path(__file__).with_name("math_worker.py")
        self.workers = WorkerPool(script, [str(CHILD_SHARE * timeout_s)])

    def __call__(
        self, prompts: list, completions: list, answer: list[str | None], **columns: Any
    ) -> list[float | None]:
        golds = _required(answer, "math")
        found = [extract_answer(completion_text(completion)) for completion in completions]
        pairs = [(gold.strip(), f) for gold, f in zip(golds, found, strict=True)]
        rewards: list[float | None] = [float(gold == found) for gold, found in pairs]
        open_rows = [i for i, (gold, found) in enumerate(pairs) if _worth_parsing(gold, found)]
        if open_rows:
            requests = [{"gold": pairs[i][0], "answer": pairs[i][1]} for i in open_rows]
            verdicts = self.workers.map(requests, self.timeout_s + PATIENCE_S)
            for row, verdict in zip(open_rows, verdicts, strict=True):
                rewards[row] = float(verdict == "right")
                self.timeouts += verdict in ("timeout", None)
        return rewards

    def close(self) -> None:
        """End the workers; a later call starts them again."""
        self.workers.close()


def _worth_parsing(gold: str, found: str) -> bool:
    """Equal strings need no worker; words none either: as products of letters, anagrams agree."""
    if gold == found or not found or _WORDS.fullmatch(gold):
        return False
    return len(found) <= MAX_ANSWER_CHARACTERS and len(gold) <= MAX_ANSWER_CHARACTERS


def _required(answers: Sequence[str | None], name: str) -> list[str]:
    """The answers; FastsdError where one is missing."""
    required = [answer for answer in answers if answer is not None and answer.strip()]
    if len(required) < len(answers):
        row = next(i for i, answer in enumerate(answers) if answer is None or not answer.strip())
        raise FastsdError(
            f'reward.function = "{name}" needs an answer for every prompt, and prompt {row} of '
            "the batch has none; map a column to `answer` in data.columns"
        )
    return required


def _arguments(rollouts: Sequence[Rollout]) -> dict[str, list]:
    extras = {name: None for rollout in rollouts for name in rollout.prompt.columns}
    arguments: dict[str, list] = {
        name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in extras
    }
    own = {
        "prompts": [[dict(m) for m in rollout.prompt.messages] for rollout in rollouts],
        "completions": [[{"role": "assistant", "content": r.text}] for r in rollouts],
        "completion_ids": [list(rollout.response_ids) for rollout in rollouts],
        "answer": [rollout.prompt.answer for rollout in rollouts],
        "solution": [rollout.prompt.solution for rollout in rollouts],
    }
    clash = sorted(own.keys() & arguments.keys())
    if clash:
        raise FastsdError(
            f"data column {clash[0]!r} has a name that reward functions need for themselves; "
            "rename it in the data file"
        )
    return {**own, **arguments}


def _accepted(reward: Reward, arguments: dict[str, list]) -> dict[str, list]:
    parameters = inspect.signature(reward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _checked(rewards: Any, count: int, name: str) -> list[float | None]:
    if not isinstance(rewards, list | tuple):
        found = type(rewards).__name__
        raise FastsdError(f"reward function {name} returned a {found}, not a list of numbers")
    if len(rewards) != count:
        raise FastsdError(
            f"reward function {name} returned {len(rewards)} rewards for {count} completions"
        )
    for index, value in enumerate(rewards):
        if value is None:
            continue
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise FastsdError(
                f"reward function {name} returned {value!r} for completion {index}; each reward "
                "is a finite number, or None for no signal"
            )
    return [None if value is None else float(value) for value in rewards]


def _import_function(spec: str) -> Reward:
    module, _, attribute = spec.partition(":")
    try:
        function: Reward = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise FastsdError(
            f'reward.function = "{spec}" cannot be imported ({type(error).__name__}: {error}); '
            "the module must be importable, e.g. from the working directory or PYTHONPATH"
        ) from error
    if not callable(function):
        raise FastsdError(
            f'reward.function = "{spec}" is a {type(function).__name__}, not callable'
        )
    return function


def _name(reward: Reward) -> str:
    module = getattr(reward, "__module__", "")
    return f"{module}:{getattr(reward, '__name__', type(reward).__name__)}"


def group_advantages(rewards_G: Sequence[float | None]) -> list[float]:
    """(r - mean) / (std + 1e-4) within one prompt's group (DeepSeekMath, arXiv 2402.03300).

    std is the sample standard deviation (divided by n - 1), as in TRL. Responses without a reward
    are outside mean and std and get 0; so does a group without spread, or with one reward only.
    """
    known = [r for r in rewards_G if r is not None]
    if any(not math.isfinite(r) for r in known):
        raise FastsdError(f"rewards must be finite numbers or None; found {list(rewards_G)}")
    if len(known) < 2 or min(known) == max(known):
        return [0.0] * len(rewards_G)
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (len(known) - 1))
    return [0.0 if r is None else (r - mean) / (std + EPSILON) for r in rewards_G]
