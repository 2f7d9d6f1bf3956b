"""How a command runs: one voice on the terminal, errors as messages, exit codes.

Of the processes that torchrun started, the first speaks for all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from fastsd.errors import FastsdError

# How long a rank's error waits for the same one of its machine's first rank.
SECOND_VOICE_S = 5.0
INTERRUPTED = 130


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """For a program's whole run: ranks beside the first print nothing but errors."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def is_first() -> bool:
    """Whether this is rank 0, also before the world is open."""
    return os.environ.get("RANK", "0") == "0"


def refuse_many() -> None:
    """Raises FastsdError where torchrun started a program several times that is one process's."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise FastsdError(
            f"torchrun started this program {size} times (WORLD_SIZE), and each would do all the "
            "work and write the same files: start it once, with python instead of torchrun, or "
            "unset WORLD_SIZE"
        )


def hear_the_first() -> None:
    """Before an error is printed: other ranks of a machine wait for its first. Mostly that one
    fails for the same reason, and torchrun ends the others before they say it again."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    # The run is over, what was to be saved is saved: the launcher's signal may end this rank.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    time.sleep(SECOND_VOICE_S)


def run_main(function: Callable[[], int | None], many: bool = False) -> int:
    """Runs a program's main and returns its exit code.

    A FastsdError is a message for the user: printed without a traceback, with its own exit code.
    Anything else that is raised is a defect and keeps its traceback. many: the program may be many
    processes; otherwise more than one is such an error.
    """
    try:
        if not many:
            refuse_many()
        return function() or 0
    except FastsdError as error:
        hear_the_first()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
