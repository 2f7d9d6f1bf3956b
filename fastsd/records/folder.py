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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError
from fastsd.evaluation.results import EvalResult
from fastsd.runtime.files import replace_text


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
