"""Where the repository's files are, for every test however deep its folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
HELPERS = TESTS / "helpers"
DATA = TESTS / "data"
