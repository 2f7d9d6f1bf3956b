"""The models that write feedback: what a text critic asks of one, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastsd.errors import CriticUnavailable
from fastsd.serving.cache import Reply
from fastsd.types import Conversation


class Writer(Protocol):
    """A frozen model that answers conversations, greedily.

    name: one clause for the run's header. identity: JSON of all that decides the text (kind, model,
    template keyword arguments, max_tokens); replies are kept under it.
    """

    name: str
    identity: dict[str, Any]

    def write(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """One reply for each conversation, in order. Raises WriterUnavailable where it is dead."""
        ...


class WriterUnavailable(CriticUnavailable):
    """A dead writer. partial: index of a conversation -> the reply that still arrived."""

    def __init__(self, message: str, partial: dict[int, Reply] | None = None):
        super().__init__(message)
        self.partial = partial or {}
