"""Tensors of which each rank of a run holds a part: DTensor, which one process never imports."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The part that lies on this rank; a plain tensor is whole everywhere."""
    spread: Any = tensor
    return spread.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, from every rank's part: a collective call."""
    spread: Any = tensor
    return spread.full_tensor() if hasattr(tensor, "full_tensor") else tensor
