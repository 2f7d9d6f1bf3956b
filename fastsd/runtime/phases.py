"""Where a step's time goes: seconds and tokens by phase, and the peak of memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

from fastsd.runtime.world import World
from fastsd.types import StepMetrics

PHASES = ("rollout", "critic", "student", "teacher", "head", "optimizer")


class PhaseClock:
    """Adds up wall-clock seconds and tokens by phase; `metrics` reads and resets them.

    Tokens are those that were computed. saved: those that full rows would have computed too.
    current: the phase that began last.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._tokens: dict[str, int] = dict.fromkeys(PHASES, 0)
        self._saved: dict[str, int] = {}
        self._notes: StepMetrics = {}
        self.current = ""

    @contextlib.contextmanager
    def phase(self, name: str, tokens: int = 0, saved: int | None = None) -> Iterator[None]:
        start, self.current = self._now(), name
        yield
        self._seconds[name] += self._now() - start
        self._tokens[name] += tokens
        if saved is not None:
            self._saved[name] = self._saved.get(name, 0) + saved

    def add_ranks(self, world: World) -> None:
        """Makes the tokens those of all ranks: a collective call. The seconds stay this rank's."""
        if world.size == 1:
            return
        found = world.gather((self._tokens, self._saved))
        self._tokens = {name: sum(tokens[name] for tokens, _ in found) for name in self._tokens}
        names = dict.fromkeys(name for _, saved in found for name in saved)
        self._saved = {name: sum(saved.get(name, 0) for _, saved in found) for name in names}

    def note(self, metrics: StepMetrics) -> None:
        """Numbers of a phase that the next `metrics` passes on."""
        self._notes |= metrics

    def metrics(self) -> StepMetrics:
        """time/PHASE_s, tokens_per_s/PHASE for the phases that ran, memory/peak_mib; of those that
        share prefixes tokens/PHASE, tokens_saved/PHASE and sharing/PHASE, full rows' tokens over
        computed ones; what was noted."""
        values = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        values["time/step_s"] = sum(self._seconds.values())
        for name, tokens in self._tokens.items():
            if tokens:
                values[f"tokens_per_s/{name}"] = tokens / max(self._seconds[name], 1e-9)
        for name, saved in self._saved.items():
            tokens = self._tokens[name]
            values[f"tokens/{name}"] = tokens
            values[f"tokens_saved/{name}"] = saved
            values[f"sharing/{name}"] = (tokens + saved) / max(tokens, 1)
        values["memory/peak_mib"] = peak_memory_mib(self._device)
        values |= self._notes
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._tokens = dict.fromkeys(PHASES, 0)
        self._saved = {}
        self._notes = {}
        return values

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_memory_mib(device: torch.device) -> float:
    """Peak of device memory on CUDA, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
