"""Data files for tests."""

from __future__ import annotations

import json
from pathlib import Path


def write_rows(path: Path, *rows: object) -> Path:
    """A JSONL file: text as it is, anything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
