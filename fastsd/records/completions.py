"""Completions of an update: kept as a parquet file with TRL's columns, and a sample of them shown,
as a rich table on a terminal, else as plain lines.

Completions, questions and critiques are untrusted. They are shown as text, never as markup, without
control and format characters (an escape sequence could drive the terminal, an override reverse the
line), shortened, and with `?` for what the output's encoding lacks.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.records.folder import RunFolderError
from fastsd.types import Rollout

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST = 320
_COLUMNS = ("question", "completion", "reward", "divergence", "critique")


def sample_rows(rows: Sequence[CompletionRow], count: int) -> list[CompletionRow]:
    """`count` of the rows, evenly spread, so that questions differ."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def completions_table(step: int, rows: Sequence[CompletionRow], encoding: str = "utf-8") -> Table:
    """The rows as a rich table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"update {step}", show_lines=True)
    for name in _COLUMNS:
        number = name in ("reward", "divergence")
        table.add_column(name, justify="right" if number else "left", no_wrap=number)
    for row in rows:
        table.add_row(*(Text(cell) for cell in _cells(row, encoding)))
    return table


def plain_completions(step: int, rows: Sequence[CompletionRow], encoding: str = "utf-8") -> str:
    """The rows as lines of `name: text` under a headline, for logs."""
    lines = [f"completions of update {step}"]
    for row in rows:
        cells = dict(zip(_COLUMNS, _cells(row, encoding), strict=True))
        lines.append(f"- reward {cells['reward']}, divergence {cells['divergence']}")
        texts = ("question", "completion", "critique")
        lines += [f"  {name}: {cells[name]}" for name in texts if cells[name]]
    return "\n".join(lines)


def visible(text: str, longest: int = _LONGEST, encoding: str = "utf-8") -> str:
    """One line of printable characters: white space is a blank, other control, format and
    unassigned characters are left out, and more than `longest` characters end in "..."."""
    line = " ".join(text[: 8 * longest].split())
    shown = "".join(c for c in line if unicodedata.category(c)[0] != "C")
    if len(shown) > longest or len(text) > 8 * longest:
        shown = shown[: longest - 3] + "..."
    return shown.encode(encoding, "replace").decode(encoding)


def _cells(row: CompletionRow, encoding: str) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def text(value: str | None) -> str:
        return visible(value or "", encoding=encoding)

    return [
        text(row.rollout.prompt.question),
        text(row.rollout.text),
        number(row.rollout.reward, 2),
        number(row.divergence, 4),
        text(row.critique),
    ]


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
