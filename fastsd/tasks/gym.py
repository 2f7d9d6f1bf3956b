"""Any dataset of reasoning-gym as a task: questions without end, answers scored by its own rules.

    [data]
    task = "reasoning_gym"
    task_options = { dataset = "gsm_symbolic", seed = 0, config = {} }

The package is imported in worker processes alone (gym_worker.py): they make the questions, and they
judge the answers, in children that are killed after reward.timeout_s. Some of its scorers execute
an answer; no answer does anything in this process but travel as text. Workers have a fixed hash
seed, because several datasets walk over sets: the same settings ask the same questions anywhere,
with the same version of the package.

The splits never share a question's text, by its hash. What they may share is a template: all of
gsm_symbolic is some 85 templates filled with different names and numbers.

There is no rule-based critic, and the steps of a response have no known truth.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd.runtime.workers import CHILD_SHARE, WorkerPool
from fastsd.tasks import TaskError, choose, did_you_mean
from fastsd.tasks.answers import completion_text, extract_answer
from fastsd.types import Critique, Prompt, Reward, Step

# How extract_answer finds it, over several lines too; the worked solutions end in this form.
INSTRUCTION = "Give the final answer between <answer> and </answer>."
MAX_ANSWER_CHARACTERS = 20_000
# Making a question, or making it again to score an answer, may take this long.
_MAKE_S = 120.0
_UNUSABLE = {
    "codeio": "it executes program snippets to make its questions",
    "composite": "name one of the datasets that it is made of",
}
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")


class ReasoningGym:
    """`fastsd.types.Task` over one dataset.

    dataset: its name in reasoning-gym. seed: chooses the questions. config: fields of the dataset's
    own configuration. instruction: put below every question, "" for none. critic_variant: given to
    every task, of no use to this one.
    """

    name = "reasoning_gym"
    has_rules = False

    def __init__(
        self,
        dataset: str = "",
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        instruction: str = INSTRUCTION,
        critic_variant: str = "local",
    ):
        self.dataset, self.seed, self.instruction = dataset, seed, instruction
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TaskError(f"data.task_options.seed: {seed!r} is not a whole number")
        if not isinstance(instruction, str):
            raise TaskError(f"data.task_options.instruction: {instruction!r} is not text")
        if importlib.util.find_spec("reasoning_gym") is None:
            raise TaskError("data.task = \"reasoning_gym\" needs: pip install 'fastsd[data]'")
        self._config = _checked_config(dataset, {} if config is None else config)
        self._prompt = functools.lru_cache(maxsize=8192)(self._make)
        # The first question shows whether the values of the configuration can be used.
        self._prompt("train", 0)

    def prompt(self, split: str, index: int) -> Prompt:
        """Question `index` of "train" or "eval"; the splits share no question text.

        solution: the worked solution of gsm_symbolic, None for other datasets. columns:
        dataset_seed and dataset_index, which with the task's options make the entry again.
        """
        choose("split", split, ("train", "eval"))
        if index < 0:
            raise TaskError(f"index {index} of split {split}: it must be 0 or more")
        return self._prompt(split, index)

    def _make(self, split: str, index: int) -> Prompt:
        made = _ask(
            {
                "do": "make",
                "dataset": self.dataset,
                "config": self._config,
                "seed": self.seed,
                "split": split,
                "index": index,
            },
            self.dataset,
        )
        content = "\n\n".join(filter(None, [made["question"], self.instruction]))
        return Prompt(
            id=f"{self.name}/{self.dataset}/{split}/{index}",
            messages=({"role": "user", "content": content},),
            answer=made["answer"],
            solution=made["solution"],
            columns={key: made[key] for key in ("dataset_seed", "dataset_index")},
        )

    def reward_within(self, timeout_s: float) -> Reward:
        """The dataset's own check as a reward function with a limit on each answer's time."""
        return GymReward(self.dataset, self._config, timeout_s)

    def reward(self, prompts: list, completions: list, **columns: list) -> list[float | None]:
        """`reward_within` one second."""
        return self.reward_within(1.0)(prompts, completions, **columns)

    def critique(self, question: str, trace: str, reference: str | None) -> Critique:
        """Raises TaskError: only the final answers of these questions can be judged by rules."""
        raise TaskError(
            "task reasoning_gym has no rules that could judge an attempt's steps: set critic.kind "
            "to local, server or replay"
        )

    def answer(self, response: str) -> str | None:
        return extract_answer(response) or None

    def steps(self, question: str, response: str) -> list[Step]:
        """None: which of a response's steps are right is not known."""
        return []


class GymReward:
    """A dataset's own scorer, in worker processes: 1.0 only where it says exactly 1.0, else 0.0.

    0.0 also for an answer over 20,000 characters, one that is not judged in time, and one that
    brings its judge down; `timeouts` counts the late ones.
    """

    __name__ = "reasoning_gym"

    def __init__(self, dataset: str, config: str, timeout_s: float):
        self.dataset, self.config, self.timeout_s = dataset, config, timeout_s
        self.timeouts = 0

    def __call__(
        self,
        prompts: list,
        completions: list,
        dataset_seed: list[int],
        dataset_index: list[int],
        **columns: Any,
    ) -> list[float | None]:
        if None in dataset_seed or None in dataset_index:
            raise TaskError(
                "task reasoning_gym can score its own questions only: a prompt has no columns "
                "dataset_seed and dataset_index"
            )
        rewards: list[float | None] = [0.0] * len(completions)
        found = [extract_answer(completion_text(completion)) for completion in completions]
        rows = [i for i, a in enumerate(found) if a and len(a) <= MAX_ANSWER_CHARACTERS]
        requests = [
            self._request(completion_text(prompts[i]), found[i], dataset_seed[i], dataset_index[i])
            for i in rows
        ]
        lines = workers().map(requests, self.timeout_s + _MAKE_S) if rows else []
        for row, line in zip(rows, lines, strict=True):
            verdict = "timeout" if line is None else self._verdict(json.loads(line))
            rewards[row] = float(verdict == "right")
            self.timeouts += verdict == "timeout"
        return rewards

    def _request(self, prompt: str, answer: str, seed: int, index: int) -> dict[str, Any]:
        return {
            "do": "score",
            "dataset": self.dataset,
            "config": self.config,
            "dataset_seed": seed,
            "dataset_index": index,
            "prompt": prompt,
            "answer": answer,
            "timeout_s": CHILD_SHARE * self.timeout_s,
        }

    def _verdict(self, reply: Mapping[str, str]) -> str:
        if "error" in reply:
            raise TaskError(f"reasoning-gym dataset {self.dataset}: {reply['error']}")
        if reply["verdict"] == "changed":
            raise TaskError(
                f"reasoning-gym dataset {self.dataset} makes another question than the one that "
                "was asked: score with the same version of the package and the same task_options"
            )
        return reply["verdict"]


@functools.cache
def workers() -> WorkerPool:
    """The processes of all tasks of this kind. Of the environment they get no keys."""
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    environment = {**kept, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    return WorkerPool(Path(__file__).with_name("gym_worker.py"), environment=environment)


def _ask(request: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    line = workers().map([request], _MAKE_S)[0]
    if line is None:
        raise TaskError(
            f"reasoning-gym dataset {dataset} took over {_MAKE_S:.0f} s or ended its process: "
            "choose an easier data.task_options.config"
        )
    reply = json.loads(line)
    if "error" in reply:
        raise TaskError(f"reasoning-gym dataset {dataset}: {reply['error']}")
    return reply


def _checked_config(dataset: object, config: object) -> str:
    """The dataset's configuration as JSON. Raises TaskError for an unknown dataset or field."""
    if not isinstance(dataset, str) or not dataset:
        raise TaskError(
            f"data.task_options.dataset: {dataset!r} names no dataset of reasoning-gym; set one, "
            'such as "gsm_symbolic"'
        )
    if not isinstance(config, Mapping):
        raise TaskError(f"data.task_options.config: {config!r} is not a table")
    if dataset in _UNUSABLE:
        raise TaskError(f"data.task_options.dataset: not {dataset!r}: {_UNUSABLE[dataset]}")
    known = _ask({"do": "describe", "dataset": dataset}, dataset)
    where = "data.task_options"
    if dataset not in known["datasets"]:
        hint = did_you_mean(dataset, known["datasets"])
        raise TaskError(f"{where}.dataset: no dataset {dataset!r}; {hint}")
    fields = [field for field in known["fields"] if field not in ("seed", "size")]
    for field in config:
        if field not in fields:
            hint = did_you_mean(field, fields)
            raise TaskError(f"{where}.config: dataset {dataset} has no field {field!r}; {hint}")
    try:
        return json.dumps(dict(config), sort_keys=True)
    except TypeError as error:
        raise TaskError(f"{where}.config: {error}") from error
