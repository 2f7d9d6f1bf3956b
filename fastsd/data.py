"""python -m fastsd.data: looks at a file of questions, or keeps those that are worth training on.

Filtering: everything that can be wrong with the rows is found before a response is sampled.
Questions go through in batches, so memory does not grow with the file; what is kept is written at
the end, whole or not at all.
"""

from __future__ import annotations

import json
import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd.errors import CheckpointError
from fastsd.evaluation.filter import KEPT, VERDICTS, Filter, FilterError, row_of
from fastsd.prompts.files import DataError, read_prompts
from fastsd.types import Prompt

if TYPE_CHECKING:
    from fastsd.config import Config
    from fastsd.prompts.sources import DataSource

# Batches of so many times the rows decoded at once: the end of one, where rows run dry, is short.
_ROWS_AHEAD = 4

USAGE = """usage: python -m fastsd.data check FILE [field=column ...]
       python -m fastsd.data filter [CONFIG.toml ...] --out FILE [--section.key VALUE ...]

check: the count and the first row of a data file. filter: keeps the questions that are hard but
learnable; see python -m fastsd.data filter --help."""

FILTER_USAGE = """usage: python -m fastsd.data filter [CONFIG.toml] --out FILE [--section.key VALUE]

Writes the questions of data.train (or data.task) that are hard but learnable to FILE, a .jsonl
that data.train takes. The filter.* settings say which; the model, prompts, sampling, reward and
critic are the configuration's, as in training. A critic's replies are kept in FILE.critic.

  --out FILE    where the rows go; its folder must exist
  --rows N      look at the first N questions only (default: the whole file; with data.task, as many
                as the run takes: optim.steps * rollout.prompts_per_step)
  --force       replace FILE if it is there

Often wanted: --filter.samples N, --filter.below SHARE, --filter.above SHARE,
--filter.format tags|steps|any, --filter.critic_solves false; all settings are listed by
python -m fastsd.train --help."""


def main(arguments: list[str]) -> int:
    """`python -m fastsd.data`; returns the exit code."""
    if arguments[:1] == ["filter"]:
        return filter_main(arguments[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(arguments) < 2 or arguments[0] != "check":
        print(USAGE, file=sys.stderr)
        return 2
    columns = {field: column for field, _, column in (a.partition("=") for a in arguments[2:])}
    try:
        prompts = read_prompts(arguments[1], columns)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments[1]}: {len(prompts)} rows; the first:\n{prompts[0]}")
    return 0


@dataclass(frozen=True)
class Request:
    """A command line. words: TOML files and flags of the configuration."""

    words: tuple[str, ...]
    out: Path
    rows: int | None
    force: bool

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Request:
        """Raises FilterError where --out is missing or wrong, or --rows is no number."""
        words, given = list(arguments), {}
        for flag in ("--out", "--rows"):
            words = [part for word in words for part in _parted(word, flag)]
            while flag in words:
                at = words.index(flag)
                given[flag] = words[at + 1] if at + 1 < len(words) else ""
                del words[at : at + 2]
        rows = given.get("--rows")
        if rows is not None and not (rows.isdecimal() and int(rows)):
            raise FilterError(f"--rows {rows}: expected a whole number of questions, 1 or more")
        out = Path(given.get("--out", ""))
        if out.suffix != ".jsonl":
            found = f"found {str(out)!r}" if "--out" in given else "it is missing"
            raise FilterError(f"--out: name a .jsonl file for the rows that are kept; {found}")
        force = "--force" in words
        rest = tuple(word for word in words if word != "--force")
        return cls(rest, out, int(rows) if rows else None, force)

    def check_out(self, train: str | None) -> None:
        """Raises FilterError where nothing may be written there."""
        if train is not None and self.out.resolve() == Path(train).resolve():
            raise FilterError(f"--out {self.out}: that is data.train itself; name another file")
        if self.out.exists() and not self.force:
            raise FilterError(f"--out {self.out}: it is there already; add --force to replace it")
        if not self.out.parent.is_dir():
            raise FilterError(f"--out {self.out}: there is no folder {self.out.parent}; make it")


def _parted(word: str, flag: str) -> list[str]:
    """`--out=FILE` as the two words that it stands for."""
    return [flag, word[len(flag) + 1 :]] if word.startswith(flag + "=") else [word]


def filter_config(words: Sequence[str]) -> Config:
    """The configuration of a command line, as for a run that asks the critic or one that does not.

    Raises ConfigError; held-out rows, which are not looked at, need not be named.
    """
    from fastsd.config import load_config

    words = [*words, *_held_out(words)]
    config = load_config([*words, "--condition", "reference"]).config
    if not config.filter.critic_solves:
        return config
    kind = config.critic.kind
    if kind == "replay" or (kind == "rule" and config.data.task is None):
        why = "only knows the attempts in its file" if kind == "replay" else "needs data.task"
        raise FilterError(
            f'critic.kind = "{kind}" cannot solve the questions: it {why}; use "local" or '
            '"server", or --filter.critic_solves false'
        )
    return load_config([*words, "--condition", "critique"]).config


def _held_out(words: Sequence[str]) -> list[str]:
    from fastsd.config.flags import parse_flags

    arguments = parse_flags(words)
    names = {override.path[1:2] for override in arguments.overrides if override.path[0] == "data"}
    for file in arguments.files:
        try:
            section = tomllib.loads(Path(file).read_text(encoding="utf-8")).get("data")
        except (OSError, ValueError):
            continue  # load_config says what is wrong with it
        names |= {(name,) for name in section} if isinstance(section, dict) else set()
    return ["--data.eval", "none.jsonl"] if ("train",) in names and ("eval",) not in names else []


def open_filter(config: Config, request: Request) -> tuple[Filter, list[Prompt]]:
    """The questions, checked, and what judges them.

    Raises FastsdError for a row without an answer or that cannot be written again, a question that
    the model has no room for, and where solver, reward or critic cannot be had.
    """
    from fastsd.evaluation.solver import Solver, answering

    needs = {"answer": "a question without one cannot be filtered by who solves it"}
    config = answering(config)
    prompts: list[Prompt] = []

    def check(source: DataSource) -> None:
        prompts.extend(source.first(_count(config, request.rows), config.seed))
        for prompt in prompts:
            row_of(prompt)

    solver = Solver(config, Path(f"{request.out}.critic"), needs, held_out=False, check=check)
    for prompt in prompts:
        solver.renderer.check_question(prompt)
    critic = solver.critic if config.filter.critic_solves else None
    return Filter(config, solver.sampler, solver.reward, critic), prompts


def _count(config: Config, rows: int | None) -> int:
    """All of a file, and of a task, which has no end, as many as the run takes."""
    if config.data.train:
        return sys.maxsize if rows is None else rows
    return rows or config.optim.steps * config.rollout.prompts_per_step


def run_filter(request: Request) -> None:
    """Filters as the command line says and prints the counts."""
    start = time.perf_counter()
    config = filter_config(request.words)
    request.check_out(config.data.train)
    judge, prompts = open_filter(config, request)
    size = max(1, _ROWS_AHEAD * config.rollout.batch_rows // config.filter.samples)
    counts: Counter[str] = Counter()
    lines: list[str] = []
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        verdicts = judge.verdicts(batch)
        counts.update(verdicts)
        lines += [row_of(p) for p, v in zip(batch, verdicts, strict=True) if v == KEPT]
        seconds = time.perf_counter() - start
        done = f"{first + len(batch)} of {len(prompts)} questions"
        print(f"  {done}, {len(lines)} kept, {seconds:.0f} s", file=sys.stderr, flush=True)
    if lines:
        _write(request.out, lines)
    _print_counts(config, counts, time.perf_counter() - start)
    if not lines:
        raise FilterError(f"no question is left, so {request.out} is not written; see the counts")


def _write(out: Path, lines: Sequence[str]) -> None:
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _print_counts(config: Config, counts: Counter[str], seconds: float) -> None:
    settings, samples = config.filter, config.filter.samples
    why = {
        "unscored": "no response could be scored",
        "too_easy": f"{settings.below:.1%} or more of {samples} responses are right",
        "hopeless": f"{settings.above:.1%} or fewer of {samples} responses are right",
        "format": f"fewer than {settings.format_share:.0%} have the form {settings.format!r}",
        "critic": "the critic does not answer them right",
        KEPT: "",
    }
    rows = sum(counts.values())
    print(f"{'rows':10} {rows:7}")
    for verdict in VERDICTS:
        if counts[verdict] or verdict == KEPT:
            print(f"{verdict.replace('_', ' '):10} {counts[verdict]:7}   {why[verdict]}".rstrip())
    record = {"rows": rows, **{verdict: counts[verdict] for verdict in VERDICTS}}
    print(json.dumps({**record, "seconds": round(seconds, 1)}), flush=True)


def filter_main(arguments: Sequence[str]) -> int:
    """The words after `python -m fastsd.data filter`; returns the exit code."""
    from fastsd.runtime.program import run_main

    if not arguments or {"-h", "--help"} & set(arguments):
        print(FILTER_USAGE)
        return 0 if arguments else 2
    return run_main(lambda: run_filter(Request.parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
