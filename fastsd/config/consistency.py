"""Settings that are each allowed and impossible together, found before anything is loaded.

Checked for one resolved condition at a time. Left alone, because they are harmless:
`teacher.ema_rate` without an ema teacher and `critic.*` without the critique condition (one file
serves all conditions), `model.freeze` beside `model.lora` (adapters train only themselves), and
LoRA with a frozen teacher (a second copy instead of adapter_off's switch).
"""

from __future__ import annotations

import importlib
import re
import string
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from fastsd.conditions import CONDITIONS, conditions_of
from fastsd.config.schema import Path, Problem, explain, section_of, unknown_key
from fastsd.config.tree import Settings
from fastsd.tasks import TASKS

REWARDS = ("task", "exact", "math")
DATA_FIELDS = ("prompt", "messages", "question", "problem", "answer", "solution")
# What each kind of critic cannot do without.
_CRITIC_NEEDS = {
    "local": {"model": "a folder or a Hugging Face name"},
    "server": {
        "url": "the base URL of the endpoint, e.g. http://127.0.0.1:8000/v1",
        "model": "the name under which the endpoint serves it",
    },
    "replay": {"file": "a completions .parquet, a folder of them, or a .jsonl"},
}
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
# A lone {word}: not \frac{a}{b}, whose braces follow a letter or another brace.
_TEMPLATE_FIELD = re.compile(r"(?<![\\\w}])\{([A-Za-z_]\w*)\}")


def find_problems(config: Settings, resolve: Callable[[Any, str], Settings]) -> list[Problem]:
    """Impossible combinations, for each condition that will run and each that has overrides.

    resolve: the settings under which a condition runs, checked in their turn.
    """
    if config.condition != "all" and not config.per_condition:
        return [problem for check in _CHECKS for problem in check(config)]
    if problems := _override_problems(config):
        return problems
    running = conditions_of(config.condition)
    for name in CONDITIONS:
        if name not in running and name not in config.per_condition:
            continue
        try:
            resolve(config, name)
        except ValidationError as error:
            # An idle condition may be impossible here; its overrides must still be well-formed.
            if name in running or error.errors()[0]["type"] != "impossible":
                problems += [
                    _place(problem, config, name) for problem in explain(error, type(config))
                ]
    return problems


def _override_problems(config: Settings) -> list[Problem]:
    problems = []
    for name, overrides in config.per_condition.items():
        path = ("per_condition", name)
        if name not in CONDITIONS:
            found = f"unknown condition; there are: {_list(CONDITIONS)}"
            problems.append(Problem(path, found))
        for key in overrides:
            field = Settings.model_fields.get(key)
            if field is None:
                problems.append(Problem((*path, key), unknown_key(Settings, (key,))))
            elif section_of(field.annotation) is None:
                found = "is not set by condition; only sections are, such as optim or loss"
                problems.append(Problem((*path, key), found))
    return problems


def _place(problem: Problem, config: Settings, name: str) -> Problem:
    """A problem of a resolved condition, at the override that caused it if there is one."""
    value: Any = config.per_condition.get(name, {})
    for part in problem.path:
        if not isinstance(value, dict) or part not in value:
            return problem
        value = value[part]
    return Problem(("per_condition", name, *problem.path), problem.message)


def find_missing(config: Settings) -> list[Problem]:
    """What a run cannot start without: asked by the command line, not of every Config in a test."""
    problems = []
    if not config.model.name:
        hint = "not set: name a model folder, a Hugging Face model or the shipped chain_sum base"
        problems.append(_problem("model.name", hint))
    if not config.data.task and not config.data.train:
        hint = f"not set: name a task ({', '.join(TASKS)}), or set data.train and data.eval"
        problems.append(_problem("data.task", hint))
    if config.resume == "auto" and "{time}" in config.run:
        hint = f'"auto" needs a fixed run folder, but run = "{config.run}" changes with the time'
        problems.append(_problem("resume", f"{hint}: set run to the folder to continue"))
    return problems


def _problem(dotted: str, message: str) -> Problem:
    path: Path = tuple(dotted.split("."))
    return Problem(path, message)


def _run_problems(config: Settings) -> list[Problem]:
    problems = []
    fields = _format_fields(config.run)
    if fields is None or not fields <= {"condition", "time"}:
        found = f'found "{config.run}", the fields {{condition}} and {{time}} are allowed'
        problems.append(_problem("run", found))
    if not _DEVICE.fullmatch(config.device):
        found = f'found "{config.device}", must be "auto", "cpu", "cuda" or "cuda:N"'
        problems.append(_problem("device", found))
    if config.teacher.kind == "adapter_off" and config.model.lora is None:
        hint = '"adapter_off" switches LoRA off: set model.lora.r, or teacher.kind = "frozen"'
        problems.append(_problem("teacher.kind", hint))
    return problems


def _format_fields(template: str) -> set[str] | None:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError:
        return None


def _data_problems(config: Settings) -> list[Problem]:
    data, problems = config.data, []
    if data.task is not None and data.task not in TASKS:
        problems.append(_problem("data.task", f'no task "{data.task}"; there are: {_list(TASKS)}'))
    if data.task and data.train:
        hint = "set together with data.task: questions come from one of the two"
        problems.append(_problem("data.train", hint))
    if data.train and not data.eval:
        hint = "data.train needs held-out rows: set data.eval to a .jsonl or .parquet file"
        problems.append(_problem("data.eval", hint))
    if data.eval and not data.train:
        hint = "only used with data.train; a task makes its own held-out questions"
        problems.append(_problem("data.eval", hint))
    for field in data.columns:
        if field not in DATA_FIELDS:
            hint = f"unknown field; there are: {_list(DATA_FIELDS)}"
            problems.append(_problem(f"data.columns.{field}", hint))
    return problems + _judge_problems(config)


def _judge_problems(config: Settings) -> list[Problem]:
    """Rewards that need a task's own check."""
    problems, function = [], config.reward.function
    from_rows = config.data.train is not None and config.data.task is None
    if function not in REWARDS and not _FUNCTION.fullmatch(function):
        found = f'found "{function}", must be {_list(REWARDS)} or "module:function"'
        problems.append(_problem("reward.function", found))
    if function == "task" and from_rows:
        hint = '"task" needs data.task; with data.train use "math", "exact" or "module:function"'
        problems.append(_problem("reward.function", hint))
    return problems


def _critic_problems(config: Settings) -> list[Problem]:
    """What the critic of the condition lacks, or cannot be reached by."""
    critic, problems = config.critic, []
    if not CONDITIONS[config.condition].critic:
        return []
    kinds = 'set critic.kind to "local", "server" or "replay"'
    if critic.kind == "rule" and config.data.train is not None and config.data.task is None:
        hint = f'"{config.condition}" with critic.kind = "rule" needs data.task; with data.train'
        problems.append(_problem("condition", f"{hint} {kinds}"))
    if critic.kind == "rule" and not _has_rules(config.data.task):
        hint = f'"{config.condition}" needs a critic, and {config.data.task} has no rules for one'
        problems.append(_problem("condition", f"{hint}: {kinds}"))
    for name in _CRITIC_NEEDS.get(critic.kind, {}):
        if not getattr(critic, name):
            hint = f'not set, and critic.kind = "{critic.kind}" needs it: '
            problems.append(_problem(f"critic.{name}", hint + _CRITIC_NEEDS[critic.kind][name]))
    if critic.kind == "server" and critic.url and (wrong := _url_problem(critic.url)):
        problems.append(_problem("critic.url", wrong))
    if critic.kind == "server" and not _VARIABLE.fullmatch(critic.api_key_env):
        hint = "must be the name of an environment variable, not a key, e.g. OPENAI_API_KEY"
        problems.append(_problem("critic.api_key_env", hint))
    return problems


def _has_rules(task: str | None) -> bool:
    """Whether a task can write critiques itself; unknown ones are somebody else's mistake."""
    if task not in TASKS:
        return True
    module, attribute = TASKS[task]
    return getattr(getattr(importlib.import_module(module), attribute), "has_rules", True)


def _url_problem(url: str) -> str | None:
    """Why a base URL cannot be used. It is not shown: it may hold a password."""
    example = "e.g. http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"not a URL ({error}): set the base URL of the endpoint, {example}"
    if parts.scheme not in ("http", "https") or not host:
        return f"must begin with http:// or https:// and name a host, {example}"
    if "@" in parts.netloc or parts.query:
        hint = "must hold no password or key, for it is written into the run folder"
        return f"{hint}; critic.api_key_env names the environment variable for one"
    return None


def _engine_problems(config: Settings) -> list[Problem]:
    """Servers of the rollouts: there, well-formed, and used."""
    rollout = config.rollout
    if rollout.engine == "vllm" and not rollout.servers:
        hint = '"vllm" needs servers: set rollout.servers, e.g. ["http://127.0.0.1:8000"]'
        return [_problem("rollout.engine", hint)]
    truncated = rollout.top_k > 0 or rollout.top_p < 1
    if rollout.engine == "vllm" and rollout.temperature != 1 and truncated:
        hint = "vLLM's log-probs are then of another distribution than the loss compares with"
        return [_problem("rollout.temperature", f"{hint}: use 1, or no top_k and top_p")]
    wrong = [problem for url in rollout.servers if (problem := _url_problem(url))]
    if len({url.rstrip("/").removesuffix("/v1") for url in rollout.servers}) < len(rollout.servers):
        wrong.append("a server is named twice: name each once")
    problems = [_problem("rollout.servers", problem) for problem in wrong]
    if rollout.max_staleness and (why := _staleness_problem(config)):
        problems.append(_problem("rollout.max_staleness", why))
    return problems


def _staleness_problem(config: Settings) -> str | None:
    """Why this run cannot use responses from older weights."""
    if config.rollout.engine != "vllm":
        return 'only servers can hold older weights: set rollout.engine = "vllm", or leave it 0'
    _, policy = _weights(config)
    if policy > 0 and config.loss.clip is None:
        return "without loss.clip responses of older weights are not reweighed: set it, or leave 0"
    return None


def _prompt_problems(config: Settings) -> list[Problem]:
    problems = []
    for name in ("reference_template", "critique_template", "sibling_template"):
        template = getattr(config.prompt, name)
        fields = _TEMPLATE_FIELD.findall(template)
        if not template.startswith("{question}"):
            message = "must begin with {question}: the student's prompt is the shared prefix"
        elif template.count("{question}") != 1 or template.count("{feedback}") != 1:
            message = "must contain {question} once and, after it, {feedback} once"
        elif unknown := set(fields) - {"question", "feedback"}:
            message = f"unknown field {{{min(unknown)}}}: only {{question}} and {{feedback}}"
        else:
            continue
        problems.append(_problem(f"prompt.{name}", message))
    return problems


def _loss_problems(config: Settings) -> list[Problem]:
    loss, problems = config.loss, []
    if loss.beta != 0.5 and loss.divergence != "jsd":
        hint = f'only "jsd" uses it, and loss.divergence is "{loss.divergence}"'
        problems.append(_problem("loss.beta", hint))
    for name in ("top_k", "entry_clip"):
        if getattr(loss, name) is not None and loss.divergence == "sampled_token":
            hint = f'"sampled_token" looks at one token: unset loss.{name} or choose another'
            problems.append(_problem(f"loss.{name}", f"{hint} loss.divergence"))
    if not loss.tail and loss.top_k is None:
        problems.append(_problem("loss.tail", "only acts with loss.top_k: set it, or drop tail"))
    return problems + _weight_problems(config)


def _weights(config: Settings) -> tuple[float, float]:
    loss = config.loss
    return CONDITIONS[config.condition].weights(loss.divergence_weight, loss.policy_weight)


def _weight_problems(config: Settings) -> list[Problem]:
    loss, problems = config.loss, []
    divergence, policy = _weights(config)
    for name, weight in (("divergence_weight", divergence), ("policy_weight", policy)):
        if weight < 0:
            found = f"found {weight}, must be >= 0: a negative weight trains away from the target"
            problems.append(_problem(f"loss.{name}", found))
    if config.condition == "grpo" and divergence > 0:
        hint = "condition grpo has no teacher: for a hybrid choose critique or reference"
        problems.append(_problem("loss.divergence_weight", f"{hint} and set loss.policy_weight"))
    if divergence == 0 and policy == 0 and loss.entropy_weight == 0:
        hint = "all weights are 0, nothing would be trained: raise one"
        problems.append(_problem("loss.policy_weight", hint))
    if policy > 0 and config.rollout.samples_per_prompt == 1:
        hint = "a group of one has no advantage: use >= 2 samples, or loss.policy_weight = 0"
        problems.append(_problem("rollout.samples_per_prompt", hint))
    return problems


def _optim_problems(config: Settings) -> list[Problem]:
    optim, problems = config.optim, []
    if optim.warmup_steps > optim.steps:
        hint = f"found {optim.warmup_steps}, must be <= optim.steps = {optim.steps}"
        problems.append(_problem("optim.warmup_steps", hint))
    if not all(0 <= beta < 1 for beta in optim.betas):
        hint = f"found {list(optim.betas)}, both must be >= 0 and < 1"
        problems.append(_problem("optim.betas", hint))
    return problems


_CHECKS = (
    *(_run_problems, _data_problems, _critic_problems, _prompt_problems, _engine_problems),
    *(_loss_problems, _optim_problems),
)


def _list(names) -> str:
    return ", ".join(f'"{name}"' for name in names)
