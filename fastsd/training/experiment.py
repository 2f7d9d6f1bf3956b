"""From one configuration to its runs: conditions x seeds from one checkpoint, then the comparison.

A single condition with a single seed is the same thing with one child. Every child is a complete
run in `<run>/<condition>-seed<k>/`; the base is evaluated once and shared. The last line on stdout
is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.conditions import conditions_of
from fastsd.config import Config, dump_toml, for_condition
from fastsd.config.load import Invocation
from fastsd.errors import FastsdError
from fastsd.records.folder import append_evaluation, read_evaluations, read_json
from fastsd.records.trackers import require_packages
from fastsd.runtime.files import replace_text
from fastsd.runtime.world import open_world
from fastsd.training.preflight import check_prompts
from fastsd.training.recorder import Recorder, implementations, run_dir_of
from fastsd.training.session import Session

if TYPE_CHECKING:
    from fastsd.config import Config
    from fastsd.evaluation.localisation import Localisation
    from fastsd.evaluation.results import EvalResult

_LOCALISATION = "localisation.json"
Train = Callable[[Config, Path, Recorder], None]


def run_experiment(invocation: Invocation, train: Train) -> None:
    """Runs everything the invocation asks for, prints the table, writes summary and report.

    train: one condition with one seed into a folder.
    """
    from fastsd.reporting.report import write_report

    config, start = invocation.config, time.perf_counter()
    world = open_world(config.parallel.timeout_s, config.device)
    run_dir = world.lead(lambda: _run_dir(config))
    conditions = conditions_of(config.condition)
    children = [
        (name, seed, for_condition(config, name).model_copy(update={"seed": seed, "seeds": 1}))
        for seed in range(config.seed, config.seed + config.seeds)
        for name in conditions
    ]
    base, where = _prepare(invocation, run_dir, [child for _, _, child in children])
    results: dict[str, list[EvalResult]] = {name: [] for name in conditions}
    try:
        for name, seed, child in children:
            results[name].append(_run_child(train, child, run_dir / f"{name}-seed{seed}", base))
    except FastsdError:
        if world.leads:
            _report_early_end(run_dir)
        raise
    if not world.leads:
        return
    seconds = time.perf_counter() - start
    summary = _summarise(config, run_dir, results, base, where, seconds)
    write_report(run_dir)
    _print_summary(summary)
    print(f"report: {run_dir / 'report.html'}")
    print(json.dumps(last_line(summary, run_dir)), flush=True)


def _report_early_end(run_dir: Path) -> None:
    """The page of a run that ends before its time: what led there stands on it."""
    from fastsd.reporting.report import write_report

    try:
        print(f"report: {write_report(run_dir)}", flush=True)
    except FastsdError as error:  # the run's own error is the one to raise
        print(f"no report: {error}", file=sys.stderr)


def last_line(summary: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The machine-readable result: Avg@k in percent, 95 % intervals, seeds, seconds, folder."""

    def points(values) -> list[float]:
        return [round(100 * value, 2) for value in values]

    pooled = {name: one["pooled"]["avg_at_k"] for name, one in summary["conditions"].items()}
    base = summary["base"]
    average = {"base": base["avg_at_k"]} | {name: values[0] for name, values in pooled.items()}
    intervals = {"base": base["intervals"]["avg_at_k"]} | {n: v[1:] for n, v in pooled.items()}
    return {
        f"avg_at_{base['samples']}": {n: points([v])[0] for n, v in average.items()},
        "ci95": {name: points(interval) for name, interval in intervals.items()},
        "differences": {name: points(v) for name, v in summary["differences"].items()},
        "seeds": summary["seeds"],
        "seconds": round(summary["seconds"], 1),
        "run": str(run_dir),
    }


def _run_dir(config: Config) -> Path:
    run_dir = run_dir_of(config.run, config.condition)
    if config.resume == "never":
        refuse_used_folder(run_dir)
    return run_dir


def _prepare(
    invocation: Invocation, run_dir: Path, children: list[Config]
) -> tuple[EvalResult, dict[str, Localisation]]:
    """Prints the header, evaluates the base once, measures where the contexts press on it."""
    require_packages(invocation.config.log)
    session = Session(children[0], run_dir)
    for config in children:  # before the first of them trains
        check_prompts(session, config)
    lead = session.world.lead
    lead(lambda: _begin_folder(invocation, run_dir))
    _print_header(invocation, session, run_dir)
    with session.gate:
        session.evaluate_if_due()
        [(_, base), *_] = lead(lambda: read_evaluations(run_dir))
        if not lead((run_dir / _LOCALISATION).exists):
            # A resumed run did not evaluate, and one rank cannot give servers their weights.
            session.sampler.update_weights(session.step, placement=session.placement)
        with session.placement.gathered():
            names = [child.condition for child in children]
            where = lead(lambda: _localisation(session, run_dir, names))
    return base, where


def _begin_folder(invocation: Invocation, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / "config.resolved.toml", dump_toml(invocation.config))


def _localisation(
    session: Session, run_dir: Path, conditions: list[str]
) -> dict[str, Localisation]:
    """What the folder has, or else what is measured now."""
    found = run_dir / _LOCALISATION
    if not found.exists():
        with session.gate.opened():
            _measure(session, run_dir, conditions)
    return _read_localisation(found)


def _measure(session: Session, run_dir: Path, conditions: list[str]) -> None:
    """Where each context presses: figures, the rollouts that the report shows, localisation.json
    last, because a resumed run takes it for the whole."""
    from fastsd.evaluation.measure import measure_localisation
    from fastsd.evaluation.views import FILE, choose_rollouts, write_views
    from fastsd.reporting.advantage_figures import write_figures

    views, measured = measure_localisation(session, conditions)
    if views:
        write_figures(run_dir, views)
        write_views(run_dir / FILE, choose_rollouts(views, session.config.report.rollouts))
    text = json.dumps({name: one.to_json() for name, one in measured.items()}, indent=2)
    replace_text(run_dir / _LOCALISATION, text)


def _read_localisation(path: Path) -> dict[str, Localisation]:
    from fastsd.evaluation.localisation import Localisation

    return {name: Localisation.from_json(one) for name, one in read_json(path).items()}


def _run_child(train: Train, config: Config, run_dir: Path, base: EvalResult) -> EvalResult:
    from fastsd.checkpoint import checkpoints
    from fastsd.reporting.model_card import write_model_card

    world = open_world(config.parallel.timeout_s, config.device)
    world.lead(lambda: _begin_child(run_dir, base))
    train(config, run_dir, Recorder(run_dir.name, sys.argv))
    world.lead(lambda: write_model_card(run_dir, checkpoints(run_dir)[0][1]))
    final = world.lead(lambda: read_evaluations(run_dir))[-1][1]
    before, after = 100 * base.avg_at_k, 100 * final.avg_at_k
    print(f"{run_dir.name}: Avg@{final.samples} {before:.1f} % -> {after:.1f} %", flush=True)
    return final


def _begin_child(run_dir: Path, base: EvalResult) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    if not read_evaluations(run_dir):
        append_evaluation(run_dir, 0, base)


def _summarise(config, run_dir, results, base, where, seconds) -> dict[str, Any]:
    from fastsd.evaluation.summary import summarise

    summary = summarise(results, base, localisation=where, task=config.data.task, seconds=seconds)
    replace_text(run_dir / "summary.json", json.dumps(summary, indent=2))
    return summary


def _print_header(invocation: Invocation, session: Session, run_dir: Path) -> None:
    config = invocation.config
    print(f"fastsd: {', '.join(invocation.sources)}")
    print(f"run folder {run_dir}")
    print(f"model {config.model.name}, teacher {config.teacher.kind}, {config.loss.divergence}")
    print("; ".join(f"{name}: {what}" for name, what in implementations(session).items()))
    sys.stdout.flush()


def _print_summary(summary: dict[str, Any]) -> None:
    from fastsd.evaluation.summary import console_table, plain_table

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(console_table(summary))
    else:
        print(plain_table(summary))


def refuse_used_folder(run_dir: Path) -> None:
    """A fresh run never writes into an old one's folder."""
    if run_dir.exists() and any(run_dir.iterdir()):
        raise FastsdError(
            f"run folder {run_dir} is not empty: continue it with --resume auto, or choose another "
            "with --run"
        )
