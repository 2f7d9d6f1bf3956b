"""Hidden states and head of a Hugging Face causal language model: what the loss head takes.

Calling the decoder alone would skip what hangs on the model's own forward (autocast, PEFT), so the
model runs as usual while its head's forward is the identity: its logits are the head's inputs.
Shape suffixes: B sequences, L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor, nn


def head_weight(model: nn.Module) -> Tensor:
    """[V, D], the parameter of the model's head.

    Raises: ValueError if the head is more than a matrix (a bias, LoRA, quantised, sharded).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    plain = type(head) is nn.Linear and head.bias is None
    if not plain or head.weight.dim() != 2 or type(head.weight) not in (nn.Parameter, Tensor):
        raise ValueError(
            f"the model's head: expected an nn.Linear without bias, got {head}; keep adapters and "
            "quantisation off it and its weight unsharded"
        )
    return head.weight


def hidden_states(model: nn.Module, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """[B, L, D], what the model gives its head; differentiable, and no [B, L, V] is made.

    Raises: ValueError if the head is not a plain matrix (`head_weight`), or if the model scales or
    caps its logits: then call `fused_linear_loss` with logit_scale or softcap instead.
    """
    head_weight(model)
    seen: list[Tensor] = []

    def identity(hidden_BLD: Tensor) -> Tensor:
        seen.append(hidden_BLD)
        return hidden_BLD

    with patch.object(model.get_output_embeddings(), "forward", identity):  # type: ignore[operator]
        logits = model(
            input_ids=input_ids_BL, attention_mask=attention_mask_BL, use_cache=False
        ).logits
    if len(seen) != 1 or not _same(logits, seen[0].to(logits.dtype)):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head (scale, softcap): call "
            "fused_linear_loss with logit_scale or softcap instead of this adapter"
        )
    return seen[0]


def _same(a: Tensor, b: Tensor) -> bool:
    # Padding may hold NaN, which is no sign of a changed logit.
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
