"""A run folder, read whole: its runs by condition, their comparison, their settings."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd.evaluation.localisation import Localisation
from fastsd.evaluation.summary import summarise
from fastsd.records.folder import RunFolderError, read_evaluations, read_json


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
