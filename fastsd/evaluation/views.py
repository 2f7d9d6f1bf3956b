"""One rollout seen by the self-teacher, token by token: what report and figures are drawn of.

A TokenView holds the numbers of one rollout under one context, and the text that they belong to.
The views of a run are one parquet file, `advantages.parquet`; report and figures need nothing else.
They are measured in `measure.py`. This module stays light: files are opened by the parquet library
only when there is one to read or write.

T: tokens of the response.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsd.errors import FastsdError
from fastsd.types import Step

if TYPE_CHECKING:
    import pyarrow as pa

    from fastsd.evaluation.localisation import Span

FILE = "advantages.parquet"
VERSION = "1"
_VERSION_KEY = b"fastsd.token_views"


class TokenViewError(FastsdError):
    """A file of views that is missing, broken, or of another version."""


@dataclass(frozen=True)
class TokenView:
    """One rollout under one context. Log-probs, divergence and entropy in nats, one per token.

    context: the condition whose feedback the teacher saw. answer: the dataset's. steps: of the
    response, marked right or wrong; () where that is not known. first_error: index of the first
    wrong one. spans: the characters of `response` that each token wrote. alternatives: the
    teacher's likeliest tokens as (text, log-prob), likeliest first.

    feedback None: the context had nothing for this rollout, because of `problem` if one is named.
    Nothing was then shown to a teacher: teacher_logprob, divergence and alternatives are ().
    """

    context: str
    prompt_id: str
    sample: int
    question: str
    response: str
    answer: str | None
    reward: float | None
    feedback: str | None
    problem: str | None
    steps: tuple[Step, ...]
    first_error: int | None
    spans: tuple[Span, ...]
    student_logprob: tuple[float, ...]
    teacher_logprob: tuple[float, ...]
    divergence: tuple[float, ...]
    entropy: tuple[float, ...]
    alternatives: tuple[tuple[tuple[str, float], ...], ...]

    @property
    def taught(self) -> bool:
        """Whether a teacher saw this rollout, so that there is an advantage."""
        return bool(self.teacher_logprob)

    @property
    def advantage(self) -> tuple[float, ...]:
        """A = log T(y_t) - log S(y_t) of each token, in fp32 as its parts are; () untaught."""
        if not self.taught:
            return ()
        teacher_T = np.asarray(self.teacher_logprob, np.float32)
        return tuple((teacher_T - np.asarray(self.student_logprob, np.float32)).tolist())


def by_rollout(views: Iterable[TokenView]) -> list[list[TokenView]]:
    """The views of each rollout together, in order; they must stand next to each other."""
    return [list(group) for _, group in groupby(views, key=lambda v: (v.prompt_id, v.sample))]


def choose_rollouts(views: Sequence[TokenView], count: int) -> list[TokenView]:
    """All views of `count` rollouts: those whose first wrong step is marked, then right ones, then
    the rest, in order within each. A quarter is kept for right ones where there are so many."""
    groups: tuple[list, list, list] = ([], [], [])
    for group in by_rollout(views):
        groups[_kind(group[0])].append(group)
    marked, right, rest = groups
    wrong = marked[: count - min(count // 4, len(right))]
    chosen = [*wrong, *right[: count - len(wrong)]]
    return [view for group in [*chosen, *rest[: count - len(chosen)]] for view in group]


def _kind(view: TokenView) -> int:
    """0: its first wrong step is marked. 1: it is right. 2: neither."""
    if view.first_error is not None:
        return 0
    return 1 if view.reward is not None and view.reward >= 1.0 else 2


def write_views(path: Path | str, views: Sequence[TokenView]) -> Path:
    """Writes one parquet file, whole or not at all, one row per view in order; returns its path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    rows = [{**vars(view), **_nested(view)} for view in views]
    columns = {name: [row[name] for row in rows] for name in schema.names}
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")
    os.replace(temporary, path)
    return path


def read_views(path: Path | str) -> list[TokenView]:
    """Inverse of `write_views`. Raises TokenViewError naming the file, and the row at fault."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A path that is a folder or a list would be read as a dataset: open it ourselves.
        with Path(path).open("rb") as file:
            table = pq.read_table(file)
    except OSError as error:
        raise TokenViewError(f"cannot read {path}: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise TokenViewError(f"{path} is not a parquet file: {error}; measure again") from error
    found = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode("utf-8", "replace")
    if found != VERSION or not table.schema.equals(_schema()):
        raise TokenViewError(
            f"{path}: expected token views of version {VERSION}, found version {found} with "
            f"columns {', '.join(table.schema.names)[:200]}; measure again"
        )
    return [_view(row, f"{path}, row {number}") for number, row in enumerate(table.to_pylist(), 1)]


def _schema() -> pa.Schema:
    import pyarrow as pa

    text, count, numbers = pa.string(), pa.int32(), pa.list_(pa.float64())
    span = [("start", count), ("end", count)]
    types = {
        **dict.fromkeys(("context", "prompt_id", "question", "response"), text),
        **dict.fromkeys(("answer", "feedback", "problem"), text),
        **dict.fromkeys(("sample", "first_error"), count),
        "reward": pa.float64(),
        "steps": pa.list_(pa.struct([*span, ("correct", pa.bool_())])),
        "spans": pa.list_(pa.struct(span)),
        "alternatives": pa.list_(pa.list_(pa.struct([("text", text), ("logprob", pa.float64())]))),
    }
    named = [(f.name, types.get(f.name, numbers)) for f in fields(TokenView)]
    return pa.schema(named, metadata={_VERSION_KEY: VERSION.encode()})


def _nested(view: TokenView) -> dict[str, Any]:
    """The fields that parquet holds as structs."""
    return {
        "steps": [vars(step) for step in view.steps],
        "spans": [{"start": start, "end": end} for start, end in view.spans],
        "alternatives": [
            [{"text": text, "logprob": logprob} for text, logprob in some]
            for some in view.alternatives
        ],
    }


def _view(row: dict[str, Any], where: str) -> TokenView:
    nullable = ("answer", "feedback", "problem", "first_error", "reward")
    if missing := [name for name, value in row.items() if value is None and name not in nullable]:
        raise TokenViewError(f"{where}: {missing[0]} is missing; measure again")
    names = ("student_logprob", "teacher_logprob", "divergence", "entropy")
    view = TokenView(
        **{
            **row,
            **{name: tuple(row[name]) for name in names},
            "steps": tuple(Step(**step) for step in row["steps"]),
            "spans": tuple((span["start"], span["end"]) for span in row["spans"]),
            "alternatives": tuple(
                tuple((one["text"], one["logprob"]) for one in some) for some in row["alternatives"]
            ),
        }
    )
    _check_lengths(view, where)
    return view


def _check_lengths(view: TokenView, where: str) -> None:
    tokens = len(view.spans)
    for name in ("student_logprob", "entropy", "teacher_logprob", "divergence", "alternatives"):
        found, optional = len(getattr(view, name)), name not in ("student_logprob", "entropy")
        if found != tokens and not (optional and found == 0):
            raise TokenViewError(
                f"{where}: {tokens} tokens and {found} values of {name}; measure again"
            )
