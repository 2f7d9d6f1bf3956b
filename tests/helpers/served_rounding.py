"""How far bf16 alone puts a model's log-probs from fp32's, by transformers: the yardstick for a
server that computes in bf16, whatever processor both run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

# Two implementations store values in bf16 at different places, a fused one at fewer: neither is
# taken to do so more than twice as often as the other.
SERVER = 2.0
# |server - trainer| <= |server - fp32| + |trainer - fp32|, and the trainer may be bf16 itself.
SERVER_TO_TRAINER = SERVER + 1.0


class Rounding(NamedTuple):
    """Log-probs of all response tokens, in one row: fp32, bf16, and bf16 that is cut off instead
    of rounded, as vLLM's kernels on x86 store it without avx512_bf16 (cpu_types_x86.hpp)."""

    exact_T: Tensor
    rounded_T: Tensor
    cut_T: Tensor

    def gap_T(self, cut: bool) -> Tensor:
        return ((self.cut_T if cut else self.rounded_T) - self.exact_T).abs()


def rounding_of(
    folder: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float
) -> Rounding:
    """rows: ids of a prompt and of a response to it. The weights are taken as bf16 for all."""
    exact, rounded, cut = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(3)
    )
    exact.float()
    for module in cut.float().modules():
        module.register_forward_hook(_cut_off)
    found = (
        torch.cat([_logprobs(model, *row, temperature) for row in rows])
        for model in (exact, rounded, cut)
    )
    return Rounding(*found)


def _cut_off(module, args, output):
    """The 16 bits that bf16 has no room for become zero."""
    if isinstance(output, Tensor) and output.dtype == torch.float32:
        return (output.view(torch.int32) & -(1 << 16)).view(torch.float32)
    if isinstance(output, tuple):
        return tuple(_cut_off(module, args, part) for part in output)
    return output


@torch.no_grad()
def _logprobs(model, prompt: Sequence[int], response: Sequence[int], temperature: float) -> Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    log_probs = (logits.double() / temperature).log_softmax(-1)
    return log_probs.gather(-1, torch.tensor([*response])[:, None])[:, 0]
