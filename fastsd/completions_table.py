"""Sample completions of an update, for the eye: a rich table on a terminal, else plain lines.

Completions, questions and critiques are untrusted. They are shown as text, never as markup, without
control and format characters (an escape sequence could drive the terminal, an override reverse the
line), shortened, and with `?` for what the output's encoding lacks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastsd.run_folder import CompletionRow

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
