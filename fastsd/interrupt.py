"""SIGTERM and SIGINT as an exception that arrives only between atomic pieces of work.

A signal may stop a step anywhere in its pure part (rollout, forward, backward), for the step is
simply done again after a resume. It waits while weights move or files are written.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(BaseException):
    """A signal asked the run to stop; `exit_code` is the shell's convention, 128 + signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class SignalGate:
    """Installs the handlers for the life of a `with` block."""

    def __init__(self) -> None:
        self._closed = 0
        self._pending: int | None = None

    def __enter__(self) -> SignalGate:
        self._previous = {
            s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Signals that come inside are raised when the block has ended."""
        self._closed += 1
        try:
            yield
        finally:
            self._closed -= 1
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
