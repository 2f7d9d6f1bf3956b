"""Command-line flags for the configuration tree, and the help text, both from the tree itself.

`--optim.lr 1e-6` is the same as `lr = 1e-6` under `[optim]` in TOML: a flag becomes a path and a
value, and everything after that (unknown keys, types, ranges) is judged together with the files.
tyro was tried first: it cannot create an optional section from one of its flags
(`--model.lora.r 64`), has no place for free tables such as `per_condition`, and reports its own
errors without regard to the files.
"""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from fastsd.config.checked import Config
from fastsd.config.schema import Path, annotation_at, is_optional, leaves, section_of, without_none

USAGE = """usage: python -m fastsd.train [CONFIG.toml ...] [--section.key VALUE ...]

Trains with on-policy self-distillation. TOML files are merged from left to right, then the flags;
without a file, a model and data, the embedded experiment runs (fastsd/tasks/chain_sum.toml).
A flag is a TOML key with dots: --optim.lr 1e-6 is `lr = 1e-6` under [optim]; `-` and `_` are the
same, `none` unsets an optional value, and a flag of an optional section creates it. Lists take all
words up to the next flag. The value in brackets is the default.

  -h, --help    show this text
  --dry-run     resolve everything, show one student and one teacher prompt, train nothing"""


@dataclass(frozen=True)
class Override:
    """One flag: the path it sets, the value, and the flag and its words as they were typed."""

    path: Path
    value: Any
    flag: str
    text: str


@dataclass
class Arguments:
    """A parsed command line; `mistakes` are (flag as typed, message)."""

    files: list[str] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    dry_run: bool = False
    help: bool = False


def parse_flags(argv: Sequence[str]) -> Arguments:
    """Splits a command line into files and overrides. Values get their type where they can; a word
    that is not of its type stays text, for the validation of the whole tree to report."""
    arguments = Arguments()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            arguments.files.append(word)
        elif word in ("-h", "--help"):
            arguments.help = True
        elif word.replace("_", "-") == "--dry-run":
            arguments.dry_run = True
        elif not word.startswith("--"):
            arguments.mistakes.append((word, "unknown flag; flags begin with two dashes"))
        else:
            _parse_setting(word, words, arguments)
    return arguments


def _parse_setting(word: str, words: list[str], arguments: Arguments) -> None:
    """One `--a.b value ...` or `--a.b=value`; takes its values off the front of `words`."""
    flag, equals, attached = word.partition("=")
    path = tuple(flag[2:].replace("-", "_").split("."))
    annotation = annotation_at(Config, path)
    kind = without_none(annotation)
    many = get_origin(kind) in (list, tuple)
    values = [attached] if equals else []
    while words and not words[0].startswith("--") and (many or not values) and not equals:
        values.append(words.pop(0))
    if not values and kind is bool:
        values = ["true"]
    if not values and annotation is None:
        values = [""]  # an unknown key: reported as that, not as a missing value
    if not values and not many:
        arguments.mistakes.append((flag, f"needs a value: {flag} VALUE"))
        return
    if many and not (values == ["none"] and is_optional(annotation)):
        item = get_args(kind)[0]
        value: Any = [_typed(text, item) for text in values]
    else:
        value = _typed(values[0], kind)
    arguments.overrides.append(Override(path, value, flag, " ".join(values)))


def _typed(text: str, kind: Any) -> Any:
    try:
        if kind in (int, float):
            return kind(text)
        if kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        if kind is Any:
            return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # not a number, not TOML: text
        return text
    return text


def help_text(width: int = 100) -> str:
    """Usage, then every flag with its values, its default and the meaning, by section."""
    sections: dict[Path, list[str]] = {}
    defaults = Config()
    for path, setting in leaves(Config):
        flag = "--" + ".".join(str(part) for part in path).replace("_", "-")
        default = _default(defaults, path)
        if len(default) > 40:
            default = default[:37] + "..."
        lines = sections.setdefault(path[:-1], ["", _section_title(path[:-1])])
        lines.append(f"  {flag}{_values(setting.annotation)}  [{default}]")
        description = " ".join((setting.description or "").split())
        indent = " " * 6
        lines += textwrap.wrap(description, width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([USAGE, *(line for lines in sections.values() for line in lines)])


def _section_title(path: Path) -> str:
    title = ".".join(str(part) for part in path) or "general"
    optional = path and is_optional(annotation_at(Config, path))
    return f"{title} (optional; any of its flags creates it)" if optional else title


def _values(annotation: Any) -> str:
    """The values as help shows them: " INT", " {a,b}|none", " [STR ...]", ".KEY VALUE"."""
    kind = without_none(annotation)
    suffix = "|none" if is_optional(annotation) else ""
    arguments = get_args(kind)
    match get_origin(kind):
        case origin if origin is Literal:
            return " {" + ",".join(arguments) + "}" + suffix
        case origin if origin is list:
            return f" [{_values(arguments[0]).strip()} ...]"
        case origin if origin is tuple:
            return "".join(_values(item) for item in arguments)
        case origin if origin is dict:
            return ".KEY VALUE"
    names = {int: " INT", float: " FLOAT", str: " STR", bool: " {true,false}"}
    return names[kind] + suffix


def _default(defaults: Config, path: Path) -> str:
    value: Any = defaults
    for depth, part in enumerate(path):
        inner = getattr(value, str(part))
        section = section_of(annotation_at(Config, path[: depth + 1]))
        value = section() if inner is None and section else inner
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "empty"
    text = str(value).replace("\n", "\\n")
    return text if value not in ({}, "") else "empty"
