"""Sample completions while a run trains: where, how often, and nothing but text."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console
from small_runs import run_small, small_config

from fastsd.records.completions import (
    CompletionRow,
    completions_table,
    plain_completions,
    sample_rows,
    visible,
)
from fastsd.types import Prompt, Rollout

# Colours and cursor moves that rich itself writes.
SGR = re.compile(r"\x1b\[[0-9;]*m")

HOSTILE = {
    "\x1b[2J\x1b]0;owned\x07done": "[2J]0;owneddone",
    "a\x9b31mb\x00c\x7f\x08d": "a31mbcd",
    "one\r\ntwo\tthree\u2028four\v\fx": "one two three four x",
    "left\u202eright\u2066\ufeff\u200b": "leftright",
    "\ud800 lone": " lone",
    "[red]not markup[/red] [link=file:///]x": "[red]not markup[/red] [link=file:///]x",
    "{braces} %s <b>": "{braces} %s <b>",
}


def row(text, question="2+2?", critique=None, reward: float | None = 1.0, divergence=0.125):
    prompt = Prompt("p", ({"role": "user", "content": question},))
    return CompletionRow(
        Rollout(prompt, 0, (1,), (0.0,), text, False, reward), 0.5, critique, divergence
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_control_and_format_characters_are_left_out(text):
    assert visible(text) == HOSTILE[text]
    assert visible(text).isprintable()


def test_long_text_is_cut_and_other_encodings_get_question_marks():
    assert visible("x" * 10**7) == "x" * 317 + "..."
    assert visible("  a\n" * 500, longest=7) == "a a ..."
    assert visible("x" * 320) == "x" * 320 and visible("") == ""
    assert visible("π ≤ 4", encoding="ascii") == "? ? 4"


@pytest.mark.parametrize("text", HOSTILE)
def test_the_table_and_the_lines_show_text_only(text):
    rows = [row(text, question=text, critique=text)]
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=200).print(completions_table(7, rows))
    assert "\x1b" not in SGR.sub("", out.getvalue()) and "\x07" not in out.getvalue()
    plain = plain_completions(7, rows)
    assert all(line.isprintable() for line in plain.split("\n"))
    for shown in (SGR.sub("", out.getvalue()), plain):
        assert "update 7" in shown and "0.1250" in shown and shown.count(visible(text)) >= 3


def test_what_is_missing_is_a_dash():
    plain = plain_completions(1, [row("x", reward=None, divergence=None)])
    assert "- reward -, divergence -" in plain and "critique" not in plain


def test_rows_are_spread_over_the_questions():
    rows = [row(str(index)) for index in range(12)]
    assert [r.rollout.text for r in sample_rows(rows, 3)] == ["0", "4", "8"]
    assert len(sample_rows(rows, 50)) == 12 and sample_rows([], 3) == []


def test_a_run_prints_and_writes_when_it_is_told_to(tmp_path, capsys):
    log = {"print_every": 2, "print_rows": 3, "completions_every": 4}
    run = run_small(small_config("critique", optim={"steps": 5}, log=log), tmp_path / "run")
    out = capsys.readouterr().out
    assert re.findall(r"completions of update (\d)", out) == ["2", "4"]
    assert out.count("- reward") == 6 and out.count("  critique: ") == 6
    written = sorted(path.name for path in (run / "completions").iterdir())
    assert written == [f"completions_0000{step}.parquet" for step in (1, 4, 5)]


def test_by_default_no_table_is_printed(tmp_path, capsys):
    run_small(small_config("critique", optim={"steps": 1}), tmp_path / "run")
    assert "completions of update" not in capsys.readouterr().out


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_on_a_terminal_it_is_a_table(tmp_path, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    log = {"print_every": 1, "print_rows": 2}
    run_small(small_config("critique", optim={"steps": 1}, log=log), tmp_path / "run")
    assert "divergence" in out.getvalue() and "─" in out.getvalue()
