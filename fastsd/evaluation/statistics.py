"""What the student and the self-teacher think of each token of a response, as numbers.

Log-probs, divergence and entropy come from the fused loss head, the teacher's likeliest tokens from
the logits of a few hundred rows at a time: nothing of shape [T, V] is made. The settings are those
of the loss: temperature, divergence, and what the model does to its logits.

Shapes: T response tokens of a part of a micro-batch, D hidden, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd.config import Config
from fastsd.config.sections import LossConfig, TeacherConfig
from fastsd.model import Policy
from fastsd.model.micro_batches import micro_batches
from fastsd.runtime.phases import PhaseClock
from fastsd.teachers.passes import Passes
from fastsd.teachers.self_teacher import Teacher
from fastsd.types import Sample
from fastsd_kernels import fused_linear_statistics

# Rows whose logits exist at once, and the columns of them that one product makes.
TOP_ROWS = 256
TOP_COLUMNS = 16384


@dataclass(frozen=True)
class TokenStatistics:
    """The numbers of one response: `fastsd.evaluation.views.TokenView` says what they are."""

    student_logprob: tuple[float, ...]
    entropy: tuple[float, ...]
    teacher_logprob: tuple[float, ...] = ()
    divergence: tuple[float, ...] = ()
    alternatives: tuple[tuple[tuple[str, float], ...], ...] = ()


@torch.no_grad()
def token_statistics(
    policy: Policy, config: Config, samples: Sequence[Sample], alternatives: int
) -> list[TokenStatistics]:
    """Statistics of each sample, in order, the policy being its own teacher.

    A sample without teacher_ids has the student's only. alternatives: the K likeliest tokens.
    """
    teacher = Teacher(policy, TeacherConfig(kind="live"))
    index_of = {id(sample): index for index, sample in enumerate(samples)}
    found: dict[int, TokenStatistics] = {}
    for batch in micro_batches(samples, config.optim.micro_batch_tokens):
        passes = Passes(policy, teacher, batch, PhaseClock(policy.device))
        for part in batch.parts:
            student_TD = passes.student(part)
            teacher_TD = passes.teacher(part, student_TD)
            columns = _columns(policy, config, part, (student_TD, teacher_TD), alternatives)
            start = 0
            for sample in part:
                stop = start + len(sample.rollout.response_ids)
                own = {name: tuple(values[start:stop]) for name, values in columns.items()}
                if sample.teacher_ids is None:
                    own = {name: own[name] for name in ("student_logprob", "entropy")}
                found[index_of[id(sample)]] = TokenStatistics(**own)
                start = stop
    return [found[index] for index in range(len(samples))]


def top_tokens(
    hidden_TD: Tensor,
    head_VD: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprob_TK, id_TK) of the k likeliest tokens of each row, likeliest first.

    Logits are those of `fastsd_kernels.fused_linear_statistics`, in fp32 (fp64 for fp64 inputs).
    """
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    k = min(k, len(head_VD))
    found = []
    for rows_D in hidden_TD.split(TOP_ROWS):
        logits = hidden_TD.new_empty((len(rows_D), len(head_VD)), dtype=dtype)
        # Slices of the head: a whole bf16 one in fp32 would be larger than the logits.
        for start in range(0, len(head_VD), TOP_COLUMNS):
            part_VD = head_VD[start : start + TOP_COLUMNS].to(dtype)
            logits[:, start : start + TOP_COLUMNS] = rows_D.to(dtype) @ part_VD.T
        if bias_V is not None:
            logits += bias_V.to(dtype)
        logits *= logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits /= temperature
        # The largest at 0: a log-prob near 0 is no difference of large numbers then.
        logits -= logits.amax(-1, keepdim=True)
        values, ids = logits.topk(k)
        found.append((values - logits.logsumexp(-1, keepdim=True), ids))
    return torch.cat([v for v, _ in found]), torch.cat([ids for _, ids in found])


def _columns(
    policy: Policy,
    config: Config,
    part: Sequence[Sample],
    hidden: tuple[Tensor, Tensor | None],
    alternatives: int,
) -> dict[str, list]:
    """The fields of TokenStatistics over all response tokens of the part, the teacher's too where
    any of its samples has one."""
    student_TD, teacher_TD = hidden
    ids = [i for sample in part for i in sample.rollout.response_ids]
    temperature, logits = config.rollout.temperature, policy.head_options()
    statistics = fused_linear_statistics(
        student_TD,
        policy.head_VD,
        torch.tensor(ids, device=policy.device),
        teacher_TD=teacher_TD,
        temperature=temperature,
        impl=config.loss.impl,
        **_divergence_options(config.loss),
        **logits,
    )
    names = ["student_logprob", "entropy"]
    columns: dict[str, list] = {}
    if teacher_TD is not None:
        names += ["teacher_logprob", "divergence"]
        top = top_tokens(
            teacher_TD, policy.head_VD, alternatives, temperature=temperature, **logits
        )
        columns["alternatives"] = _named(policy.tokenizer, *top)
    return columns | {name: getattr(statistics, f"{name}_T").tolist() for name in names}


def _divergence_options(loss: LossConfig) -> dict[str, Any]:
    """The loss's divergence; of the sampled token's estimate, the whole that it estimates."""
    kind = "reverse_kl" if loss.divergence == "sampled_token" else loss.divergence
    names = ("beta", "top_k", "tail", "entry_clip")
    return {"divergence": kind, **{name: getattr(loss, name) for name in names}}


def _named(
    tokenizer: Any, logprob_TK: Tensor, id_TK: Tensor
) -> list[tuple[tuple[str, float], ...]]:
    """Alternatives with the text of each token alone; special tokens show theirs."""
    rows = list(zip(id_TK.tolist(), logprob_TK.tolist(), strict=True))
    text = {i: _token_text(tokenizer, i) for i in {i for ids, _ in rows for i in ids}}
    return [tuple((text[i], p) for i, p in zip(ids, ps, strict=True)) for ids, ps in rows]


def _token_text(tokenizer: Any, token_id: int) -> str:
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(token_id)
    # SentencePiece drops the space that a piece alone begins with.
    spaced = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
    return f" {text}" if spaced else text
