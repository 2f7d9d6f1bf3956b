"""SIGTERM and SIGINT as an exception that arrives only between atomic pieces of work.

A signal may stop a step anywhere in its pure part (rollout, forward, backward), for the step is
simply done again after a resume. It waits while weights move or files are written.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, Protocol

from fastsd.errors import Interrupted


class Ranks(Protocol):
    """What a gate asks of `fastsd.runtime.world.World`."""

    size: int

    def gather(self, value: Any) -> list[Any]: ...


class SignalGate:
    """Installs the handlers for the life of a `with` block.

    Of many processes none may stop on its own: there the gate is closed but where it is `opened`,
    and a signal to any rank stops all when they next `agree`.
    """

    def __init__(self, world: Ranks | None = None) -> None:
        self._world = world if world is not None and world.size > 1 else None
        self._closed = 0 if self._world is None else 1
        self._pending: int | None = None

    def __enter__(self) -> SignalGate:
        self._previous = {
            s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # One rank's end makes the launcher signal the others, which are ending too: they go on.
        ending = self._world is not None and kind is not None
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_IGN if ending else handler)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Signals that come inside are raised when the block has ended."""
        self._closed += 1
        try:
            yield
        finally:
            self._closed -= 1
        self._raise_pending()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Where ranks work on their own: signals are raised at once, the one that waits first."""
        if self._world is None:
            yield
            return
        self._closed -= 1
        try:
            self._raise_pending()
            yield
        finally:
            self._closed += 1

    def agree(self) -> None:
        """Raises Interrupted on every rank where a signal waits on one: a collective call."""
        if self._world is None:
            return
        signals = [signum for signum in self._world.gather(self._pending) if signum is not None]
        if signals:
            self._pending = None
            raise Interrupted(signals[0])

    def _raise_pending(self) -> None:
        if not self._closed and self._pending is not None:
            signum, self._pending = self._pending, None
            raise Interrupted(signum)

    def _handle(self, signum: int, frame: object) -> None:
        if self._closed:
            self._pending = signum
        else:
            # One signal is enough: a second one must not break the save that follows.
            self._closed += 1
            raise Interrupted(signum)
