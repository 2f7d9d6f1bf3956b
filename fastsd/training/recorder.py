"""What a run leaves behind while it trains: run.json, metrics, completions, and a progress line.

On a terminal one live line shows the step; elsewhere a plain line is printed now and then, so that
a log file stays readable. The metrics go to the configured trackers too.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd import __version__
from fastsd.config import dump_toml
from fastsd.errors import CheckpointError, FastsdError, Interrupted, RankLost
from fastsd.records.completions import (
    CompletionRow,
    completions_table,
    plain_completions,
    sample_rows,
    write_completions,
)
from fastsd.records.folder import MetricsWriter
from fastsd.records.trackers import Tracker, open_trackers
from fastsd.runtime.files import replace_text

if TYPE_CHECKING:
    from fastsd.training.session import Session
    from fastsd.training.statistics import StepStatistics


class Recorder:
    """Writes one run's files. `label` names the run in the progress line."""

    def __init__(self, label: str, argv: Sequence[str] = ()):
        self.label = label
        self.argv = list(argv)
        self._live: Any = None
        self._writer: MetricsWriter | None = None
        self._trackers: list[Tracker] = []

    def open(self, session: Session, *, resumed: bool) -> None:
        """Creates the run folder's first files; after a resume drops what will be done again."""
        run_dir = session.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir / "config.resolved.toml", dump_toml(session.config))
        replace_text(run_dir / "run.json", json.dumps(run_facts(session, self.argv), indent=2))
        self._writer = MetricsWriter(run_dir, keep_through=session.step)
        self._start, self._first_step = time.perf_counter(), session.step
        if not session.done:
            log = session.config.log
            self._trackers = open_trackers(log, run_dir, self.label, session.step, self.say)
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4, transient=True)
            self._live.start()
        if resumed:
            self.say(f"{self.label}: resumed after update {session.step}")

    def record(self, session: Session, statistics: StepStatistics) -> None:
        """Part of an update, signals held: metrics, now and then completions, the progress line."""
        assert self._writer is not None
        metrics = statistics.metrics()
        self._writer.write(session.step, metrics)
        for tracker in self._trackers:
            tracker.log(session.step, metrics)
        log, step = session.config.log, session.step
        if step == 1 or step % log.completions_every == 0 or session.done:
            write_completions(session.run_dir, step, _rows(statistics))
        if log.print_every and step % log.print_every == 0:
            self._print_completions(step, sample_rows(_rows(statistics), log.print_rows))
        for warning in session.guard.warnings():
            self.say(f"{self.label}: {warning}")
        self._progress(session, metrics)

    def say(self, line: str) -> None:
        """A line that stays, on a terminal and in a log."""
        print(line, flush=True) if self._live is None else self._live.console.print(
            line, markup=False, highlight=False
        )

    def stopped(self, session: Session, stop: BaseException) -> None:
        """A run that a signal or bad input ends is saved as of its last whole update."""
        no_save = isinstance(stop, CheckpointError | RankLost)
        bad_input = isinstance(stop, FastsdError) and not no_save
        if isinstance(stop, Interrupted) or (bad_input and session.step):
            path = session.save()
            what = stop if isinstance(stop, Interrupted) else type(stop).__name__
            self.say(f"{self.label}: {what} after update {session.step}, saved {path}")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for tracker in self._trackers:
            tracker.close()
        if self._live is not None:
            self._live.stop()

    def _print_completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        if self._live is None:
            print(plain_completions(step, rows, encoding), flush=True)
        else:
            self._live.console.print(completions_table(step, rows, encoding))

    def _progress(self, session: Session, metrics: dict[str, float]) -> None:
        steps = session.config.optim.steps
        elapsed = time.perf_counter() - self._start
        left = elapsed / (session.step - self._first_step) * (steps - session.step)
        shown = ("loss", "reward/mean", "divergence/mean", "entropy/mean", "length/mean")
        values = "  ".join(f"{n.split('/')[0]} {metrics[n]:.3f}" for n in shown if n in metrics)
        line = f"{self.label}  {session.step}/{steps}  {values}  {left:.0f} s left"
        if self._live is not None:
            self._live.update(line)
        elif session.step % max(1, steps // 5) == 0 or session.done:
            print(line, flush=True)


class Follower(Recorder):
    """The recorder of a rank beside the first: takes part in what is saved, and writes nothing."""

    def open(self, session: Session, *, resumed: bool) -> None:
        pass

    def record(self, session: Session, statistics: StepStatistics) -> None:
        session.guard.warnings()

    def say(self, line: str) -> None:
        pass


def run_facts(session: Session, argv: Sequence[str]) -> dict[str, Any]:
    """run.json: what ran, with what, where."""
    import numpy
    import torch
    import transformers

    config = session.config
    return {
        "fastsd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "argv": list(argv),
        "condition": config.condition,
        "seed": config.seed,
        "eval_seed": config.eval.seed,
        "implementations": implementations(session),
    }


def implementations(session: Session) -> dict[str, str]:
    """Which implementation of each operation this run uses."""
    policy, critic = session.policy, session.maker.critic
    return {
        "loss_head": session.loss_head,
        "linear": policy.linear_name,
        "attention": f"{policy.attention_name}, packed token trees",
        "sampler": session.sampler.name,
        **({} if critic is None else {"critic": critic.name}),
        "device": str(policy.device),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "threads": str(_threads()),
        **({"weights": session.placement.name} if session.placement.name else {}),
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _rows(statistics: StepStatistics) -> list[CompletionRow]:
    return [
        CompletionRow(s.rollout, s.advantage, s.feedback.text, statistics.divergence(index))
        for index, s in enumerate(statistics.samples)
    ]


def run_dir_of(template: str, condition: str) -> Path:
    """The run folder that a configuration's `run` names."""
    now = time.strftime("%Y%m%d-%H%M%S")
    return Path(template.replace("{condition}", condition).replace("{time}", now))
