"""Errors that a user can see, with their exit codes. What a room adds derives from FastsdError."""

from __future__ import annotations

import signal


class FastsdError(Exception):
    """An error meant for the user: printed without a traceback, ends with `exit_code`."""

    exit_code = 2


class CriticUnavailable(FastsdError):
    exit_code = 3


class TrainingDiverged(FastsdError):
    exit_code = 4


class CheckpointError(FastsdError):
    exit_code = 5


class Interrupted(BaseException):
    """A signal asked the run to stop; `exit_code` is the shell's convention, 128 + signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class RankLost(FastsdError):
    """Another rank does not answer: it died, or hangs. Nothing can be saved without it."""

    exit_code = 1
