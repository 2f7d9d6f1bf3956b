"""Rows of JSONL and parquet files as prompts.

Every row is checked when the file is read, before a model is loaded, and an error says which file,
row and field is at fault and what was found there. The fields of a row are found by name, or by
data.columns (our field -> your column); columns that are none of ours go along to the reward
function (`Prompt.columns`).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastsd.errors import FastsdError
from fastsd.types import Prompt

_QUESTION_FIELDS = ("prompt", "messages", "question", "problem")
_FIELDS = (*_QUESTION_FIELDS, "answer", "solution")
_ROLES = ("system", "user", "assistant")


class DataError(FastsdError):
    """A data file or a data setting that cannot be used."""


def read_prompts(
    path: str | Path, columns: Mapping[str, str], needs: Mapping[str, str] = MappingProxyType({})
) -> list[Prompt]:
    """All rows of a .jsonl or .parquet file as prompts, checked. Raises DataError."""
    path = Path(path)
    for field in columns:
        if field not in _FIELDS:
            hint = _did_you_mean(field, _FIELDS)
            raise DataError(
                f"data.columns has no field {field!r}{hint}; it has {', '.join(_FIELDS)}"
            )
    prompts: list[Prompt] = []
    row_of_id: dict[str, int] = {}
    for number, row in read_rows(path):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with columns, found {_show(row)}")
        prompt = _prompt(row, columns, f"{path.name}:{number}", where)
        if prompt.id in row_of_id:
            first = row_of_id[prompt.id]
            raise DataError(f"{where}, id: {prompt.id!r} is also the id of row {first}")
        for field, why in needs.items():
            if getattr(prompt, field) is None:
                column = columns.get(field, field)
                raise DataError(f"{where}, {column}: missing, but {why} (map it with data.columns)")
        row_of_id[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} has no rows")
    return prompts


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(1-based row, or line of a JSONL file; parsed row). Blank lines are skipped."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    else:
        raise DataError(f"{path}: expected a .jsonl or .parquet file")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {number}: not UTF-8 ({error})") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, row {number}: not JSON ({error})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
    yield from enumerate(table.to_pylist(), start=1)


def _prompt(row: dict[str, Any], columns: Mapping[str, str], default_id: str, where: str) -> Prompt:
    for field, column in columns.items():
        if column not in row:
            hint = _did_you_mean(column, row)
            raise DataError(
                f"{where}: there is no column {column!r} (data.columns.{field}){hint}; "
                f"found {', '.join(map(str, row)) or 'none'}"
            )
    field, column = _question_column(row, columns, where)
    value, at = row[column], f"{where}, {column}"
    if field == "messages" or (field == "prompt" and isinstance(value, list)):
        messages = _messages(value, at)
    else:
        messages = ({"role": "user", "content": _text(value, at)},)
    answer, solution = columns.get("answer", "answer"), columns.get("solution", "solution")
    used = {column, answer, solution, "id"}
    return Prompt(
        id=_id(row.get("id"), default_id, f"{where}, id"),
        messages=messages,
        answer=_answer(row.get(answer), f"{where}, {answer}"),
        solution=_optional_text(row.get(solution), f"{where}, {solution}"),
        columns={name: item for name, item in row.items() if name not in used},
    )


def _question_column(
    row: dict[str, Any], columns: Mapping[str, str], where: str
) -> tuple[str, str]:
    """Our field and the row's column that hold the question: the mapped one, or the only one."""
    mapped = [(field, columns[field]) for field in _QUESTION_FIELDS if field in columns]
    found = mapped or [(field, field) for field in _QUESTION_FIELDS if row.get(field) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(column for _, column in found)
        raise DataError(
            f"{where}: {names} could each be the question; choose one, e.g. "
            f'data.columns.{found[0][0]} = "{found[0][1]}"'
        )
    raise DataError(
        f"{where}: no question; expected one of {', '.join(_QUESTION_FIELDS)}, found "
        f"{', '.join(map(str, row)) or 'no columns'}; map yours in data.columns"
    )


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a list of messages, found {_show(value)}")
    messages = []
    for index, message in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise DataError(
                f"{at}: expected an object with role and content, found {_show(message)}"
            )
        for key in message:
            # Parquet fills keys that other rows have with null.
            if key not in ("role", "content") and message[key] is not None:
                raise DataError(f"{at}.{key}: only role and content are understood; remove it")
        role = message.get("role")
        if role not in _ROLES:
            raise DataError(f"{at}.role: expected one of {', '.join(_ROLES)}, found {_show(role)}")
        messages.append({"role": role, "content": _text(message.get("content"), f"{at}.content")})
    if messages[-1]["role"] != "user":
        found = messages[-1]["role"]
        raise DataError(f"{where}: the last message must be the user's question, found {found!r}")
    return tuple(messages)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, found {_show(value)}")
    if not value.strip():
        raise DataError(f"{where}: the text is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not valid Unicode ({error})") from error
    return value


def _optional_text(value: Any, where: str) -> str | None:
    return None if value is None else _text(value, where)


def _answer(value: Any, where: str) -> str | None:
    """Text, or a number as Python writes it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value):
        return str(value)
    return _optional_text(value, where)


def _id(value: Any, default: str, where: str) -> str:
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, where)


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _did_you_mean(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, [str(name) for name in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
