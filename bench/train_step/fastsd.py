"""fastsd's side of the step bench: the trainer's own session, sampler, samples and update.

Conditions differ in data: reference shows one feedback text to all responses, critique one to
each, grpo has no teacher. Without sharing every response has a question and a feedback text of its
own and the teacher's weights are a copy, so that nothing is in common: same kernels, same lengths.

What the trainer's clock calls student contains the backward pass; here that is a phase of its own,
and adding up the gradients belongs to the optimizer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.train_step.problem import (
    LEARNING_RATE,
    ROWS,
    TEACHER_TEMPLATE,
    Configuration,
    Lengths,
    digest,
    feedback,
    question,
    responses,
)
from bench.train_step.worker import Channel, Memory, Meter, serve
from fastsd.config import Config
from fastsd.rewards.functions import score_rollouts
from fastsd.train import update
from fastsd.training.collect import samples_of
from fastsd.training.session import Session
from fastsd.types import Feedback, Prompt, Rollout

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def run(settings: dict[str, Any], channel: Channel) -> None:
    contestant = Contestant(settings)
    channel.send(contestant.facts())
    serve(contestant.answer, channel)


class Contestant:
    """settings: folder, configuration, threads, precision (fp32, bf16), condition (grpo, reference,
    critique), shared, checkpointing."""

    def __init__(self, settings: dict[str, Any]):
        self.configuration = Configuration.from_json(settings["configuration"])
        self.shared = settings["shared"]
        self.own_feedback = not self.shared or settings["condition"] == "critique"
        folder = Path(settings["folder"])
        self.session = Session(_config(settings, self.configuration, folder), folder / "run")
        self.session.sampler.stop_ids = frozenset()  # every response has its full length
        self.meter = Meter()
        _meter_phases(self.session, self.meter)
        self.memory = Memory()

    def facts(self) -> dict[str, Any]:
        session = self.session
        return {
            "rest_bytes": self.memory.rest,
            "loss_head": session.loss_head,
            "attention": session.policy.attention_name,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """do: step (an optimizer step) or generate (rollouts only)."""
        do = {"step": self.step, "generate": self.generate}
        return do[request.pop("do")](**request)

    def step(
        self, index: int, sampled: bool, lengths: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """One optimizer step on the index-th question. lengths: of a scripted step, where they are
        not the configuration's."""
        at = Lengths(**lengths) if lengths else self.configuration.lengths
        self._start()
        with self.meter.phase("rollout"):
            groups = 1 if self.shared else at.samples
            prompts = [self._prompt(index, at, sample) for sample in range(groups)]
            draw = self._sampled if sampled else self._scripted
            rollouts = draw(prompts, index, at, at.samples // groups)
            rewards = score_rollouts(self.session.reward, rollouts)
            rollouts = [replace(r, reward=v) for r, v in zip(rollouts, rewards, strict=True)]
            given = [self._feedback(index, at, i) for i in range(at.samples)]
            samples = samples_of(self.session, rollouts, given)
        statistics = update(self.session, samples)
        found = self.meter.read() | self.memory.read()
        metrics = statistics.extra
        return found | {
            "loss": statistics.loss,
            "grad_norm": metrics["grad_norm"],
            "tokens": {
                role: int(metrics[f"tokens/{role}"])
                for role in ("student", "teacher")
                if f"tokens/{role}" in metrics
            },
            "digest": digest(
                [[*s.student_ids, *s.rollout.response_ids] for s in samples],
                [[*(s.teacher_ids or ()), *s.rollout.response_ids] for s in samples],
            ),
            "responses": [len(rollout.response_ids) for rollout in rollouts],
        }

    def generate(self, index: int, questions: int, tokens: int) -> dict[str, Any]:
        """The configuration's responses to each of `questions` questions of `tokens` tokens."""
        at = replace(self.configuration.lengths, question=tokens)
        self._start()
        prompts = [self._prompt(index + i, at, 0) for i in range(questions)]
        rollouts = self._sampled(prompts, index, at, at.samples)
        found = self.meter.read() | self.memory.read()
        return found | {"responses": [len(rollout.response_ids) for rollout in rollouts]}

    def _start(self) -> None:
        self.memory.start()
        self.meter.start()

    def _prompt(self, index: int, at: Lengths, sample: int) -> Prompt:
        text = question(self.configuration.vocabulary, index, at.question, sample)
        return Prompt(f"{index} {sample}", ({"role": "user", "content": text},))

    def _feedback(self, index: int, at: Lengths, sample: int) -> Feedback:
        if self.session.teacher is None:
            return Feedback(None)
        own = sample if self.own_feedback else 0
        return Feedback(feedback(self.configuration.vocabulary, index, at.feedback, own))

    def _sampled(self, prompts: list[Prompt], index: int, at: Lengths, each: int) -> list[Rollout]:
        return self.session.sampler.sample(prompts, each, key=(index,))

    def _scripted(self, prompts: list[Prompt], index: int, at: Lengths, each: int) -> list[Rollout]:
        vocabulary = self.configuration.vocabulary
        logprobs = (-math.log(vocabulary),) * at.response
        return [
            Rollout(prompts[i // each], i % each, tuple(ids), logprobs, "", truncated=True)
            for i, ids in enumerate(responses(vocabulary, index, at))
        ]


def _config(settings: dict[str, Any], configuration: Configuration, folder: Path) -> Config:
    data, lengths = str(folder / "train.jsonl"), configuration.lengths
    tree = {
        "condition": "grpo" if settings["condition"] == "grpo" else "reference",
        "threads": settings["threads"],
        "device": "cpu",
        "model": {
            "name": str(folder),
            "dtype": DTYPES[settings["precision"]],
            "gradient_checkpointing": settings["checkpointing"],
        },
        "teacher": {"kind": "live" if settings["shared"] else "frozen"},
        "data": {"train": data, "eval": data, "shuffle": False},
        "prompt": {"reference_template": TEACHER_TEMPLATE},
        "rollout": {
            "prompts_per_step": 1,
            "samples_per_prompt": lengths.samples,
            "max_new_tokens": lengths.response,
        },
        "reward": {"function": "bench.train_step.problem:half_right"},
        "loss": {"divergence": "reverse_kl"},
        # As TRL's: the same update from the same gradient.
        "optim": {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "steps": ROWS},
    }
    return Config(**tree)


def _meter_phases(session: Session, meter: Meter) -> None:
    """The clock's phases, with the backward pass and the gradients' sums taken out of student."""
    clocked = session.clock.phase

    @contextlib.contextmanager
    def phase(name: str, *args, **kwargs) -> Iterator[None]:
        with clocked(name, *args, **kwargs), meter.phase(name):
            yield

    session.clock.phase = phase
    meter.wrap(torch.autograd, "backward", "backward")
    meter.wrap(session.optimizer, "accumulate", "optimizer")
