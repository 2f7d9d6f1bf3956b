"""Metrics for experiment trackers, beside metrics.jsonl, which is the truth.

    tensorboard   RUN/tensorboard, event files
    trackio       its own SQLite database, shared by runs (TRACKIO_DIR, else Hugging Face's cache)
    wandb         RUN/wandb, an offline run, for `wandb sync`

Nothing leaves the machine: wandb runs offline with everything off that looks at machine, code, git
or environment; trackio is written through its storage class, because its `init` asks the Hub for
the user's name and obeys variables that name a server. A package that is missing is an error before
training starts. A tracker that fails later warns once and gets nothing more; training goes on.

A resumed run goes on under the id in RUN/trackers.json, so that no tracker shows an update twice:
tensorboard is told to forget the updates that are done again, trackio keeps the first of two equal
ones, and `wandb sync` merges the parts by id.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fastsd.config.sections import LogConfig
from fastsd.errors import FastsdError
from fastsd.records.folder import read_json
from fastsd.runtime.files import replace_text
from fastsd.types import StepMetrics


class Tracker(Protocol):
    """One place where metrics go."""

    def log(self, step: int, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    config: LogConfig,
    run_dir: Path,
    label: str,
    done: int = 0,
    say: Callable[[str], None] = print,
) -> list[Tracker]:
    """The configured trackers, each safe to call: a failure is said once and ends that one only.

    label: the run's name there, after its parent folder's. done: updates that are on record.
    Raises FastsdError naming the tracker whose package is missing or that cannot start.
    """
    require_packages(config)
    if not config.trackers:
        return []
    run_dir.mkdir(parents=True, exist_ok=True)
    run_id, name = _run_id(run_dir), f"{run_dir.resolve().parent.name}/{label}"
    opened: list[Tracker] = []
    for kind in config.trackers:
        try:
            tracker = _KINDS[kind](config.project, name, run_id, run_dir, done)
        except Exception as error:
            for one in opened:
                one.close()
            raise FastsdError(
                f"log.trackers: {kind} cannot start: {type(error).__name__}: {error}; repair it, "
                "or leave it out"
            ) from error
        opened.append(_Fallible(kind, tracker, say))
    return opened


def require_packages(config: LogConfig) -> None:
    """Raises FastsdError where a configured tracker's package is not installed."""
    for kind in config.trackers:
        if importlib.util.find_spec(kind) is None:
            raise FastsdError(
                f"log.trackers: \"{kind}\" is not installed; pip install 'fastsd[trackers]', or "
                "leave it out"
            )


def _run_id(run_dir: Path) -> str:
    """The run's id with trackers that are shared by runs; it stays the same over resumes."""
    path = run_dir / "trackers.json"
    if not path.exists():
        replace_text(path, json.dumps({"id": uuid.uuid4().hex[:12]}) + "\n")
    return read_json(path)["id"]


class _Fallible:
    """Passes finite metrics on to a tracker until that fails."""

    def __init__(self, kind: str, tracker: Tracker, say: Callable[[str], None]):
        self._kind, self._say = kind, say
        self._tracker: Tracker | None = tracker

    def log(self, step: int, metrics: StepMetrics) -> None:
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._try(lambda tracker: tracker.log(step, finite))

    def close(self) -> None:
        self._try(lambda tracker: tracker.close())
        self._tracker = None

    def _try(self, action: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            self._say(
                f"{self._kind} failed and gets no more metrics ({type(error).__name__}: {error}); "
                "metrics.jsonl has them all"
            )


class _Tensorboard:
    def __init__(self, project: str, name: str, run_id: str, run_dir: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        forget = done + 1 if done else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=forget, flush_secs=10)

    def log(self, step: int, metrics: StepMetrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, project: str, name: str, run_id: str, run_dir: Path, done: int):
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.validate_project_name(project)
        SQLiteStorage.init_db(project)
        self._storage, self._project, self._name, self._id = SQLiteStorage, project, name, run_id

    def log(self, step: int, metrics: StepMetrics) -> None:
        self._storage.bulk_log(
            project=self._project,
            run=self._name,
            metrics_list=[metrics],
            steps=[step],
            log_ids=[f"{self._id}-{step}"],
            run_id=self._id,
        )

    def close(self) -> None:
        """Each call of `log` has committed."""


class _Wandb:
    def __init__(self, project: str, name: str, run_id: str, run_dir: Path, done: int):
        # Read when the package is imported and when it starts its process.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        settings = wandb.Settings(
            mode="offline",
            root_dir=str(run_dir),
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_disable_viewer=True,
            x_save_requirements=False,
        )
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            settings=settings,
        )

    def log(self, step: int, metrics: StepMetrics) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[str, str, str, Path, int], Tracker]] = {
    "tensorboard": _Tensorboard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
