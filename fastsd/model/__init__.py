"""Hugging Face models as policies: token trees in, hidden states out, each shared prefix once.

In: a model's name or folder, token trees, rows to decode. Out: `Policy` and `load_policy`; other
rooms also use `loading` and `policy` (parameters by name), `micro_batches`, `packing`
(PrefixKeys), `refusals` (ModelError, lengths), `facts`, `attention`, `cpu_linear` and
`packed_layers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.model.loading import load_policy
    from fastsd.model.policy import Policy

__all__ = ["Policy", "load_policy"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: transformers is slow to import, and half of the room needs none."""
    if name == "Policy":
        from fastsd.model.policy import Policy

        return Policy
    if name == "load_policy":
        from fastsd.model.loading import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
