"""Reading a tree of pydantic sections by path: types, help words, and mistakes with a fix.

pydantic says what is wrong in its own words and by its own locations; a user needs the dotted key,
what was found and what is allowed. Everything here takes the root model as an argument, so that
`fastsd.config` can use it while it is being validated.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Path = tuple[str | int, ...]
Root = type[BaseModel]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One mistake: the path of its key, and what was found and what is allowed."""

    path: Path
    message: str

    @property
    def dotted(self) -> str:
        return ".".join(str(part) for part in self.path)


def deep_merge(base: dict, over: dict) -> dict:
    """`base` with the values of `over`; tables are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = deep_merge(merged[key], value)
        merged[key] = value
    return merged


def validate(root: type[Model], tree: dict) -> Model:
    """`tree` (as TOML gives it) as a `root`; raises pydantic.ValidationError.

    Strict: "3" is not 3. The JSON way in, because only there strict pydantic takes a list for a
    tuple. The text "none" unsets a value that may be unset, for TOML has no null; overrides by
    condition keep it until they are merged.
    """
    text = json.dumps(_unset_none(root, tree, ()), default=str)
    return root.model_validate_json(text, strict=True)


def _unset_none(root: Root, value: Any, path: Path) -> Any:
    if isinstance(value, dict) and path != ("per_condition",):
        return {key: _unset_none(root, inner, (*path, key)) for key, inner in value.items()}
    return None if value == "none" and is_optional(annotation_at(root, path)) else value


def leaves(section: Root, path: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Every setting that is not itself a section, in order; optional sections are entered too."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield (*path, name), field
        else:
            yield from leaves(inner, (*path, name))


def annotation_at(root: Root, path: Path) -> Any:
    """The declared type at `path`, or None where the tree has no such key.

    Below a free table (dict[str, V]) every key has type V; overrides by condition are a tree again.
    """
    annotation: Any = root
    for depth, part in enumerate(path):
        section = section_of(annotation)
        if section is not None:
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif get_origin(annotation) is dict:
            overrides = path[0] == "per_condition" and depth == 1
            annotation = root if overrides else get_args(annotation)[1]
        elif annotation is not Any:
            return None
    return annotation


def section_of(annotation: Any) -> Root | None:
    """The section class of a section or optional section, else None."""
    annotation = without_none(annotation)
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def is_optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)


def without_none(annotation: Any) -> Any:
    if not is_optional(annotation):
        return annotation
    return next(arg for arg in get_args(annotation) if arg is not type(None))


def allowed(field: FieldInfo) -> str:
    """What a setting may be, in words: "an integer >= 1", 'one of "a", "b"', "a number or none"."""
    bounds = []
    for item in field.metadata:
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if getattr(item, attribute, None) is not None:
                bounds.append(f"{sign} {getattr(item, attribute)}")
    words = " ".join([_words(without_none(field.annotation)), " and ".join(bounds)]).strip()
    return f"{words} or none" if is_optional(field.annotation) else words


def _words(annotation: Any) -> str:
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return "one of " + ", ".join(f'"{value}"' for value in arguments)
        case origin if origin is list:
            return "a list of strings"
        case origin if origin is tuple:
            return f"a list of {len(arguments)} numbers"
        case origin if origin is dict:
            return "a table"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return names.get(annotation, "a table")


def explain(error: ValidationError, root: Root) -> list[Problem]:
    """pydantic's errors as problems, each with what was found and what is allowed."""
    problems: list[Problem] = []
    for entry in error.errors(include_url=False):
        path = entry["loc"]
        if entry["type"] == "impossible":
            problems += entry.get("ctx", {})["problems"]
        elif entry["type"] == "extra_forbidden":
            problems.append(Problem(path, unknown_key(root, path)))
        else:
            problems.append(_wrong_value(root, path, entry))
    return problems


def _wrong_value(root: Root, path: Path, entry: Any) -> Problem:
    while path and _field_at(root, path) is None:
        path = path[:-1]
    field = _field_at(root, path)
    found = json.dumps(entry["input"], default=str, ensure_ascii=False)
    if len(found) > 60:
        found = found[:57] + "..."
    return Problem(path, f"found {found}, must be {allowed(field) if field else entry['msg']}")


def _field_at(root: Root, path: Path) -> FieldInfo | None:
    section = section_of(annotation_at(root, path[:-1])) if path else None
    return section.model_fields.get(str(path[-1])) if section else None


def unknown_key(root: Root, path: Path) -> str:
    """The message for a key that does not exist: the nearest sibling, else its name elsewhere."""
    section = section_of(annotation_at(root, path[:-1]))
    siblings = list(section.model_fields) if section else []
    name = str(path[-1]).replace("-", "_")
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f'unknown key; did you mean "{_join((*path[:-1], near[0]))}"?'
    by_name: dict[str, Path] = {key: (key,) for key in root.model_fields}
    for leaf, _ in leaves(root):
        by_name.setdefault(str(leaf[-1]), leaf)
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)
    if near:
        return f'unknown key; did you mean "{_join(by_name[near[0]])}"?'
    return f"unknown key; here are allowed: {', '.join(siblings)}"


def _join(path: Path) -> str:
    return ".".join(str(part) for part in path)
