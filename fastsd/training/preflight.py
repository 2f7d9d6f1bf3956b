"""What a run would trip over late, found before it starts: its prompts, and ranks that loaded
something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsd.config import Config
from fastsd.errors import FastsdError
from fastsd.evaluation.solver import Solver, renderer_for
from fastsd.prompts.sources import required_fields
from fastsd.runtime.agreement import digest, json_digest, refuse_differences
from fastsd.runtime.world import World
from fastsd.training.feedback import feedback_maker
from fastsd.types import Prompt

QUESTIONS_COMPARED = 64


def check_prompts(solver: Solver, config: Config) -> None:
    """Raises FastsdError for the prompts that a run under `config` cannot use.

    The self-teacher's prompt must begin as the student's does, and every question of the run must
    fit. Feedback needs no check: it is cut to the room that is left.
    """
    renderer = renderer_for(solver.policy, config)
    count = config.optim.steps * config.rollout.prompts_per_step
    training = solver.train_data.take(0, count, config.seed)
    template = feedback_maker(config, None).template
    if template is not None:
        renderer.check_template(template, like=training[0])
    for field, why in required_fields(config).items():
        missing = next((prompt.id for prompt in training if getattr(prompt, field) is None), None)
        if missing is not None:
            raise FastsdError(f"prompt {missing!r} has no {field}, but {why}")
    for prompt in _distinct([*training, *solver.eval_prompts(config.eval.questions)]):
        renderer.check_question(prompt)


def _distinct(prompts: Iterable[Prompt]) -> Iterable[Prompt]:
    """Each object once: rows of a file come again in every epoch."""
    return {id(prompt): prompt for prompt in prompts}.values()


def refuse_other_inputs(solver: Solver, world: World) -> None:
    """Raises FastsdError on every rank where one has loaded another model or other questions, or
    computes in another type. Collective; before the weights are spread."""
    refuse_differences(world, lambda: _inputs(solver))


def _inputs(solver: Solver) -> dict[str, Any]:
    policy, config = solver.policy, solver.config
    parameters = dict(policy.model.named_parameters())
    tokenizer = policy.tokenizer
    taken = solver.train_data.take(0, QUESTIONS_COMPARED, config.seed)
    held_out = solver.eval_prompts(min(config.eval.questions, QUESTIONS_COMPARED))
    asked = [[p.id, [*map(dict, p.messages)], p.answer, p.solution] for p in [*taken, *held_out]]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "the kind of device": policy.device.type,
        "the compute type (model.dtype)": str(policy.dtype).removeprefix("torch."),
        "the number of parameters": sum(p.numel() for p in parameters.values()),
        "the digest of the weights": _weights_digest(parameters),
        "the digest of the tokenizer": json_digest([vocabulary, tokenizer.chat_template]),
        "the digest of the questions": json_digest(asked),
    }


def _weights_digest(parameters: Mapping[str, Tensor]) -> str:
    return digest(
        f"{name} {tuple(p.shape)} {p.dtype} {_bit_sum(p)}".encode()
        for name, p in sorted(parameters.items())
    )


def _bit_sum(tensor: Tensor) -> int:
    """The sum of its memory as 64-bit words: exact, so the same on every device and thread count,
    and as fast as memory is."""
    bytes_ = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if bytes_.storage_offset() % 8:  # a view of words must begin at one
        bytes_ = bytes_.clone()
    words = len(bytes_) // 8 * 8
    rest = bytes_[words:].sum(dtype=torch.int64)
    return int(bytes_[:words].view(torch.int64).sum() + rest)
