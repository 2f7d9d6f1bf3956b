"""python -m fastsd.train: the loop.

One optimizer step is: roll out, verify, get feedback, run student and teacher over the same
response tokens, let the loss head compare them, step. What differs between the conditions is data
(`fastsd.conditions.CONDITIONS`), so the loop below does not know their names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsd.config import Config
    from fastsd.training.recorder import Recorder
    from fastsd.training.session import Session
    from fastsd.training.statistics import StepStatistics
    from fastsd.types import Sample


def train(config: Config, run_dir: Path, recorder: Recorder) -> None:
    """Trains one condition with one seed into `run_dir`, continuing what is there if asked to."""
    from fastsd.runtime.agreement import refuse_own_folders
    from fastsd.runtime.world import guarded
    from fastsd.training.recorder import Follower
    from fastsd.training.session import Session

    session = Session(config, run_dir)
    recorder = recorder if session.world.leads else Follower(recorder.label)
    refuse_own_folders(session.world, run_dir)
    recorder.open(session, resumed=config.resume == "auto" and session.restore())
    with session.gate:
        try:
            with guarded(session.where):
                while True:
                    session.evaluate_if_due()
                    if session.done:
                        break
                    update(session, session.next_samples(), recorder.record)
                    session.save_if_due()
        except BaseException as stop:
            recorder.stopped(session, stop)
            raise
        finally:
            recorder.close()


def update(
    session: Session,
    samples: Sequence[Sample],
    record: Callable[[Session, StepStatistics], None] = lambda session, statistics: None,
) -> StepStatistics:
    """One optimizer step on `samples`. All that a resume needs changes in the last block only."""
    from fastsd.training.loss import TokenWeights, loss_head
    from fastsd.training.statistics import StepStatistics

    config, teacher, head = session.config, session.teacher, session.placement.loss_head
    weights = TokenWeights.for_step(samples, session.maker)
    statistics = StepStatistics(samples)
    session.optimizer.zero_grad()
    counted = [sample for sample in samples if weights.counts(sample)]
    for batch in session.micro_batches(counted):
        passes = session.passes(batch, teaches=weights.divergence != 0)
        for part in batch.parts:
            student_TD = passes.student(part)
            teacher_TD = passes.teacher(part, student_TD)
            with session.clock.phase("head", len(student_TD)):
                out = loss_head(student_TD, teacher_TD, part, weights, config, teacher, head)
            with session.clock.phase("student"):
                session.optimizer.backward(out.loss)
            statistics.add(part, out)
        if batch.deferred:
            session.optimizer.accumulate()
            passes.finish()
    session.placement.release()
    statistics.add_ranks(session.world)
    session.clock.add_ranks(session.world)
    with session.gate.closed():
        with session.clock.phase("optimizer", statistics.tokens):
            stepped = session.optimizer.step()
            if teacher is not None and not stepped["skipped"]:
                teacher.update(session.optimizer.masters)
        session.advance()
        statistics.extra = {**stepped, **session.clock.metrics()}
        statistics.extra |= session.guard.observe(session.step, statistics.metrics(), len(samples))
        record(session, statistics)
    session.guard.check()
    return statistics


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see `python -m fastsd.train --help`."""
    from fastsd.config import load_config
    from fastsd.errors import Interrupted
    from fastsd.runtime.agreement import refuse_other_start
    from fastsd.runtime.program import is_first, one_voice, run_main
    from fastsd.runtime.world import guarded, left_in_order, open_world

    def run() -> None:
        invocation = load_config(sys.argv[1:] if argv is None else list(argv))
        config = invocation.config
        with left_in_order(), guarded():
            world = open_world(config.parallel.timeout_s, config.device)
            refuse_other_start(world, config.model_dump(mode="json"))
            if invocation.dry_run:
                from fastsd.training.dry_run import dry_run

                dry_run(invocation, update)
            else:
                from fastsd.training.experiment import run_experiment

                run_experiment(invocation, train)

    try:
        with one_voice():
            return run_main(run, many=True)
    except Interrupted as stop:
        if is_first():
            print(f"stopped by {stop}: continue with --resume auto", file=sys.stderr)
        return stop.exit_code


if __name__ == "__main__":
    from fastsd.runtime.world import leave

    leave(main)
