"""The whole story in dataclasses: what flows through a training step, in order.

    Prompt -> Rollout -> Feedback -> Sample -> TokenTree -> StepMetrics

Everything imports this module; it imports nothing of fastsd and nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Prompt:
    """One question. `messages` are chat turns (role, content); the last is the user's question."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str | None = None
    solution: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    response_ids are the ids as sampled (a stop token included, never re-tokenised); logprobs are
    log p(y_t) of the temperature-scaled policy before top-k / top-p, one per id; text is the
    decoded response without special tokens. truncated: it reached max_new_tokens without a stop.
    reward: None means "no signal".
    """

    prompt: Prompt
    sample: int
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool
    reward: float | None = None


# reward(prompts, completions, completion_ids, **columns) -> a number or None for each: TRL's shape.
Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Step:
    """One step of a response: character span [start, end) of its text, and whether it is right."""

    start: int
    end: int
    correct: bool


@dataclass(frozen=True)
class Feedback:
    """What the self-teacher is shown for one rollout.

    text=None: this rollout has no teacher, because the condition has nothing for it, or because of
    `problem`, the class of a critic's failure ("timeout", "wrong_answer", ...). Of a critique,
    first_error: index of the first step that it changes; prefix_share: of the attempt's steps, how
    many it repeats verbatim before that.
    """

    text: str | None
    first_error: int | None = None
    problem: str | None = None
    prefix_share: float | None = None


class Critique(Feedback):
    """A critic's step-aligned rewrite of a trace."""


@dataclass(frozen=True)
class Sample:
    """One rollout with everything the loss needs of it.

    student_ids: the prompt. teacher_ids: the prompt with feedback, None without a teacher.
    advantage: GRPO's group-normalised reward; 0 where there is no signal. feedback: what the
    teacher is shown; feedback_cut: it was shortened to fit, or had no room. dropped: it counts for
    nothing.
    """

    rollout: Rollout
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...] | None
    advantage: float
    feedback: Feedback = Feedback(None)
    feedback_cut: bool = False
    dropped: bool = False

    @property
    def group(self) -> str:
        return self.rollout.prompt.id


@dataclass(frozen=True)
class Branch:
    """One continuation of a TokenTree's prefix: context (the teacher's feedback), then response.

    Hidden states are wanted for the rows that predict `response_ids` only.
    """

    context_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenTree:
    """[ prefix | branch_1 ... branch_G ]: positions of every branch restart at len(prefix)."""

    prefix_ids: tuple[int, ...]
    branches: tuple[Branch, ...]


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest common prefix of the sequences."""
    shortest, longest = min(sequences), max(sequences)
    length = next(
        (i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b),
        min(len(shortest), len(longest)),
    )
    return shortest[:length]


# Metric name -> number, flat ("time/rollout_s", "reward/mean"): one JSON line per optimizer step.
StepMetrics = dict[str, float]


# Chat turns (role, content), as a served model takes them.
Conversation = list[dict[str, str]]


class Critic(Protocol):
    """Writes feedback for attempts. A frozen judge of the trace; it never sets the reward.

    name: one clause for the run's header, e.g. "rule (chain_sum, local)".
    """

    name: str

    def critique(self, rollouts: Sequence[Rollout]) -> list[Critique]:
        """One critique for each rollout, in order. Raises CriticUnavailable where it is dead."""
        ...


class Task(Protocol):
    """A procedural task with checkable steps."""

    name: str

    def prompt(self, split: str, index: int) -> Prompt:
        """The index-th question of split "train" or "eval"; deterministic, unbounded."""
        ...

    def reward(self, prompts: list, completions: list, **columns: list) -> list[float | None]:
        """Binary reward with TRL's reward-function signature (conversational completions)."""
        ...

    def critique(self, question: str, trace: str, reference: str | None) -> Critique:
        """The rule-based critic on one attempt; raises TaskError where the task has none."""
        ...

    def answer(self, response: str) -> str | None:
        """The final answer that votes in maj@k; None where there is none."""
        ...

    def steps(self, question: str, response: str) -> list[Step]:
        """The response's steps with right/wrong, for localisation figures."""
        ...
