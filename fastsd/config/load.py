"""From a command line to one validated configuration, with errors a user can act on.

TOML files are merged from left to right, then flags; the merged tree is validated once, and every
mistake is reported with its dotted key, where that value came from (file:line or flag), what was
found and what is allowed: all of them at once, in one ConfigError.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path as FilePath
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from fastsd.config.checked import Config, resolve_condition
from fastsd.config.consistency import find_missing
from fastsd.config.flags import Arguments, help_text, parse_flags
from fastsd.config.schema import Path, Problem, deep_merge, explain, validate
from fastsd.config.toml_lines import key_lines
from fastsd.errors import FastsdError

PRESET = FilePath(str(resources.files("fastsd.tasks") / "chain_sum.toml"))


class ConfigError(FastsdError):
    """One or more mistakes in the configuration; `lines` has one located message for each."""

    exit_code = 2

    def __init__(self, lines: Sequence[str]):
        self.lines = tuple(lines)
        count = len(self.lines)
        head = [] if count == 1 else [f"{count} mistakes in the configuration:"]
        super().__init__("\n  ".join([*head, *self.lines]))


@dataclass(frozen=True)
class Invocation:
    """What a command line asks for.

    sources: files and flags in the order they were applied. preset: the embedded experiment is the
    base, because nothing else was named.
    """

    config: Config
    dry_run: bool
    sources: tuple[str, ...]
    preset: bool


@dataclass
class _Merged:
    """A tree under construction and, for each path, where its value was last set."""

    tree: dict = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)

    def add(self, over: dict, origins: dict[Path, str]) -> None:
        self.tree = deep_merge(self.tree, over)
        self.origins |= origins

    def locate(self, problem: Problem) -> str:
        for depth in range(len(problem.path), 0, -1):
            origin = self.origins.get(problem.path[:depth])
            if origin and origin.replace("-", "_") == f"__{problem.dotted}":
                return f"{origin}: {problem.message}"
            if origin:
                return f"{origin}: {problem.dotted}: {problem.message}"
        return f"{problem.dotted}: {problem.message}"


def load_config(argv: Sequence[str]) -> Invocation:
    """The command line of `fastsd.train` -> its configuration.

    Raises ConfigError with every mistake found; prints the help and raises SystemExit(0) for
    --help.
    """
    arguments = parse_flags(argv)
    if arguments.help:
        _print_help()
        raise SystemExit(0)
    if arguments.mistakes:
        raise ConfigError([f"{flag}: {message}" for flag, message in arguments.mistakes])
    preset = _is_embedded(arguments)
    files = [PRESET] if preset else [FilePath(name) for name in arguments.files]
    merged = _Merged()
    for file in files:
        merged.add(*_read_toml(file))
    for override in arguments.overrides:
        tree: Any = override.value
        for part in reversed(override.path):
            tree = {part: tree}
        merged.add(tree, {override.path: override.flag})
    flags = [f"{override.flag} {override.text}" for override in arguments.overrides]
    sources = ["the embedded experiment" if preset else str(file) for file in files] + flags
    return Invocation(_validated(merged), arguments.dry_run, tuple(sources), preset)


def _print_help() -> None:
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_embedded(arguments: Arguments) -> bool:
    paths = [override.path for override in arguments.overrides]
    named = any(path[0] == "data" or path == ("model", "name") for path in paths)
    return not arguments.files and not named


def _validated(merged: _Merged) -> Config:
    try:
        config = validate(Config, merged.tree)
    except ValidationError as error:
        problems = explain(error, Config)
        raise ConfigError([merged.locate(problem) for problem in problems]) from None
    if missing := find_missing(config):
        raise ConfigError([merged.locate(problem) for problem in missing])
    return config


def _read_toml(path: FilePath) -> tuple[dict, dict[Path, str]]:
    """A file's tree and the file:line of each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from None
    except OSError as error:
        hint = "words without -- are TOML configuration files"
        raise ConfigError([f"{path}: {error.strerror} ({hint})"]) from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_error(path, text, str(error))]) from None
    return tree, {key: f"{path}:{line}" for key, line in key_lines(text).items()}


def _syntax_error(path: FilePath, text: str, message: str) -> str:
    """tomllib says "... (at line 3, column 5)" or "... (at end of document)"."""
    what, _, where = message.rpartition(" (at ")
    found = re.fullmatch(r"line (\d+), column (\d+)\)", where)
    if found:
        line, column = int(found[1]), int(found[2])
    else:
        lines = text.split("\n")
        line, column = len(lines), len(lines[-1]) + 1
    return f"{path}:{line}:{column}: not valid TOML: {what}"


def for_condition(config: Config, name: str) -> Config:
    """`config` as condition `name` runs it: per_condition[name] merged in, condition = name.

    Raises ConfigError for overrides that do not fit.
    """
    try:
        return resolve_condition(config, name)
    except ValidationError as error:
        lines = [f"{p.dotted}: {p.message}" for p in explain(error, Config)]
        raise ConfigError([f"condition {name}: {line}" for line in lines]) from None


def dump_toml(config: Config) -> str:
    """TOML that `load_config` reads back as an equal configuration.

    TOML has no null: an unset value is left out where unset is the default, else written "none".
    """
    return tomli_w.dumps(_plain(config), multiline_strings=False)


def _plain(section: BaseModel) -> dict:
    plain = {}
    for name, setting in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            plain[name] = _plain(value)
        elif value is not None:
            plain[name] = list(value) if isinstance(value, tuple) else value
        elif setting.default is not None:
            plain[name] = "none"
    return plain
