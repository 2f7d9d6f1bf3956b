"""What a run writes while it runs, and how it is read back: metrics, evaluations, completions.

    <run>/metrics.jsonl                        one JSON object per optimizer step
    <run>/evaluation.json                      [{"step": 0, ...EvalResult}, ...]
    <run>/completions/completions_00010.parquet
    <run>/localisation.json                    {context: Localisation}
    <run>/summary.json                         of a parent of <condition>-seed<k>/ runs

Files are the interface: the report needs nothing else, so it can be written again at any time.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError
from fastsd.evaluation.localisation import Localisation
from fastsd.evaluation.results import EvalResult
from fastsd.evaluation.summary import summarise
from fastsd.runtime.files import replace_text
from fastsd.types import Rollout


class RunFolderError(FastsdError):
    """A run folder that lacks a file, or holds one that cannot be read."""


class MetricsWriter:
    """Appends one JSON line per step to `<run>/metrics.jsonl`, flushed at once.

    JSON has no NaN: non-finite numbers become null, and each line says how many there were
    ("non_finite"); `non_finite` counts them over the writer's life. On opening, a line that a crash
    cut short is dropped, and so are the steps after `keep_through` (resume: those are run again).
    """

    def __init__(self, run_dir: Path | str, keep_through: int | None = None) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.non_finite = 0
        if self.path.exists():
            kept = read_metrics(run_dir)
            if keep_through is not None:
                kept = [line for line in kept if line["step"] <= keep_through]
            replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        self.non_finite += len(bad)
        clean = {name: None if name in bad else float(value) for name, value in metrics.items()}
        line = {"step": step, **clean, "non_finite": len(bad)}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; [] where there is none. A last line without its newline was cut
    short by a crash and is left out; any other bad line is a RunFolderError with file and line."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise RunFolderError(f'{path}:{number}: a metrics line must be an object with a "step"')
    return records


def read_json(path: Path) -> Any:
    """A JSON file's value; RunFolderError naming the file where it is missing or broken."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{where}: not JSON ({error}); delete it or run again") from error


def append_evaluation(run_dir: Path | str, step: int, result: EvalResult) -> None:
    """Add a result to evaluation.json; an earlier one of the same or a later step gives way."""
    path = Path(run_dir) / "evaluation.json"
    earlier = [r for r in (read_json(path) if path.exists() else []) if r["step"] < step]
    replace_text(path, json.dumps([*earlier, {"step": step, **result.to_json()}]) + "\n")


def read_evaluations(run_dir: Path | str) -> list[tuple[int, EvalResult]]:
    """(step, result) pairs in order of step; [] where there is no evaluation.json."""
    path = Path(run_dir) / "evaluation.json"
    records = read_json(path) if path.exists() else []
    return [(record["step"], EvalResult.from_json(record)) for record in records]


@dataclass(frozen=True)
class CompletionRow:
    """One line of the completions table: a scored rollout, what the teacher was shown for it, and
    the mean over its tokens of the divergence (None: no teacher)."""

    rollout: Rollout
    advantage: float | None
    critique: str | None
    divergence: float | None


def write_completions(
    run_dir: Path | str, step: int, rows: Sequence[CompletionRow], reward_name: str = "reward"
) -> Path:
    """completions/completions_<step>.parquet: TRL's columns (step, prompt, completion, <reward
    name>, advantage; prompt and completion as chat messages) plus critique and divergence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    turns = [
        [{"role": m["role"], "content": m["content"]} for m in r.rollout.prompt.messages]
        for r in rows
    ]
    answers = [[{"role": "assistant", "content": row.rollout.text}] for row in rows]
    columns = {
        "step": pa.array([step] * len(rows), pa.int64()),
        "prompt": pa.array(turns, messages),
        "completion": pa.array(answers, messages),
        reward_name: pa.array([row.rollout.reward for row in rows], pa.float64()),
        "advantage": pa.array([row.advantage for row in rows], pa.float64()),
        "critique": pa.array([row.critique for row in rows], pa.string()),
        "divergence": pa.array([row.divergence for row in rows], pa.float64()),
    }
    folder = Path(run_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"completions_{step:05d}.parquet"
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.table(columns), temporary)
    os.replace(temporary, path)
    return path


def read_last_completions(run_dir: Path | str) -> list[dict[str, Any]]:
    """Rows of the newest completions file, as dicts; [] where there is none."""
    files = sorted((Path(run_dir) / "completions").glob("completions_*.parquet"))
    if not files:
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(files[-1]).to_pylist()
    except pa.ArrowException as error:
        raise RunFolderError(f"cannot read {files[-1]}: {error}; delete it") from error


@dataclass(frozen=True)
class Run:
    """A run folder, read: children by condition (seed order), the comparison if there is one."""

    folder: Path
    children: dict[str, list[Path]]
    summary: dict[str, Any] | None
    config: dict[str, Any]


def read_run(run_dir: Path | str) -> Run:
    """Read a run folder; RunFolderError where it is not one or a file in it is broken."""
    folder = Path(run_dir).resolve()
    children = _children(folder)
    config = _config(folder, [path for paths in children.values() for path in paths])
    if not children:
        if not (folder / "metrics.jsonl").exists() and not (folder / "evaluation.json").exists():
            raise RunFolderError(
                f"{folder} is not a run folder: it has neither metrics.jsonl, evaluation.json nor "
                "<condition>-seed<k> folders"
            )
        children = {config.get("condition", folder.name): [folder]}
    path = folder / "summary.json"
    summary = read_json(path) if path.exists() else _summary_of(folder, children, config)
    return Run(folder, children, summary, config)


def _children(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("*-seed*"):
        match = re.fullmatch(r"(.+)-seed(\d+)", path.name)
        if match and path.is_dir():
            found.setdefault(match[1], []).append((int(match[2]), path))
    order = ["grpo", "reference", "critique"]
    names = sorted(found, key=lambda name: (order.index(name) if name in order else 3, name))
    return {name: [path for _, path in sorted(found[name])] for name in names}


def _config(folder: Path, children: Sequence[Path]) -> dict[str, Any]:
    for path in (folder, *children):
        file = path / "config.resolved.toml"
        if file.exists():
            try:
                return tomllib.loads(file.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise RunFolderError(f"cannot read {file}: {error}") from error
    return {}


def _summary_of(
    folder: Path, children: Mapping[str, Sequence[Path]], config: Mapping
) -> dict[str, Any] | None:
    """The comparison from what the children evaluated; None before there is a first and a last."""
    runs = {name: [read_evaluations(path) for path in paths] for name, paths in children.items()}
    whole = {name: [one for one in seeds if len(one) > 1] for name, seeds in runs.items()}
    finals = {name: [one[-1][1] for one in seeds] for name, seeds in whole.items() if seeds}
    bases = [one[0][1] for seeds in whole.values() for one in seeds if one[0][0] == 0]
    if not finals or not bases:
        return None
    found = folder / "localisation.json"
    records = read_json(found) if found.exists() else {}
    places = {name: Localisation.from_json(record) for name, record in records.items()}
    task = config.get("data", {}).get("task")
    return summarise(finals, bases[0], localisation=places, task=task)
