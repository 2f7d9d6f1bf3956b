"""The per-token part of the page: each rollout, step by step, in the colours of its advantage.

A rollout is a block to be opened; in it, for each context, a table: a row for each step of the
response, with the step of the feedback that has the same number beside it. The coloured text is
plain HTML and needs no script. Neighbouring tokens of one colour are one element there; a script
splits them into tokens when the block is opened and shows the numbers that `token_data.py` packed,
so that a page of 64 rollouts of 2,048 tokens stays below 3 MB.

Sign and strength are also in the underline, and a step's place (right, first wrong, after) in
words: colour carries nothing alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.evaluation.summary import LOCALISATION_HEADERS, localisation_rows
from fastsd.evaluation.views import TokenView, by_rollout
from fastsd.reporting.page import escaped, inline_picture, write_page
from fastsd.reporting.token_data import EDGES, TAGS, Detail, RolloutTokens, fit, levels, runs
from fastsd.tasks.steps import parse_steps

if TYPE_CHECKING:
    from markupsafe import Markup

    from fastsd.evaluation.localisation import Localisation
    from fastsd.types import Task

ROOM = 2_500_000
"""Bytes of the page that the per-token part may take, before it leaves out detail."""
REPEATED = 160  # a longer step that the feedback repeats word for word is not printed twice
MARKS = {"right": "✓ right", "wrong": "✗ first wrong", "after": "↓ after"}
PLACES = {
    "before": "before",
    "at": "first wrong step",
    "after": "after",
    "correct": "correct responses",
}
FIRST, LAST = "start", "end"
_BLOCK_BYTES = 600  # of a context's block beside its table


@dataclass(frozen=True)
class Piece:
    """Characters [start, end) of a text: a step (number from 1), or what stands before or after
    all steps (FIRST, LAST)."""

    key: int | str
    start: int
    end: int


def token_section(
    views: Sequence[TokenView], task: Task | None, room: int = ROOM
) -> dict[str, Any]:
    """What tokens.html.j2 shows of the views of one run.

    task: whose steps the feedback is cut into where the response's steps are the task's; without
    one `fastsd.tasks.steps.parse_steps` cuts it. room: bytes to stay within, by leaving out detail.
    """
    rollouts = [RolloutTokens(group) for group in by_rollout(views)]
    bare = Detail(floor=math.inf)
    rows = "".join(
        _table_rows(one, view, bare, task) + view.question
        for one in rollouts
        for view in one.taught
    )
    texts = len(rows.encode("utf-8", "replace")) + _BLOCK_BYTES * len(views)
    detail = fit(rollouts, max(room - texts, 0))
    return {
        "rollouts": [_rollout(one, detail, task) for one in rollouts],
        "detail": detail,
        "edges": EDGES,
        "legend": [(-3, "≤ −4"), (-2, "−1"), (-1, "−¼"), (0, "0"), (1, "¼"), (2, "1"), (3, "≥ 4")],
        "tags": TAGS,
    }


def write_token_page(
    path: Path | str,
    views: Sequence[TokenView],
    localisation: Mapping[str, Localisation],
    task: Task | None = None,
) -> Path:
    """Writes the per-token part as a page of its own; returns its path.

    localisation: context -> its figures on all measured rollouts, of which `views` are some.
    """
    path = Path(path)
    where = {name: one.to_json() for name, one in localisation.items()}
    return write_page(
        path,
        "token_page.html.j2",
        title=path.stem,
        localisation=localisation_part(views, where),
        tokens=[("", token_section(views, task))],
    )


def localisation_part(
    views: Sequence[TokenView], localisation: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What parts.html.j2 shows of it: the table, the bars of its means, and the figures of the
    views, if there are any. localisation: context -> Localisation.to_json()."""
    from fastsd.evaluation.localisation import Localisation
    from fastsd.reporting import plots

    figures: list[str] = []
    if views:
        from fastsd.reporting.advantage_figures import inline_figures

        where = {name: Localisation.from_json(dict(one)) for name, one in localisation.items()}
        figures = inline_figures(views, where)
    means = {
        context: {name: one["mean_abs"][place] for place, name in PLACES.items()}
        for context, one in localisation.items()
    }
    title = "Mean |A| around the first wrong step"
    bars = [plots.bars("localisation", title, means, "mean |log T − log S|")] if means else []
    return {
        "headers": LOCALISATION_HEADERS,
        "rows": localisation_rows({"localisation": localisation}),
        "bars": [inline_picture(svg) for svg in bars],
        "figures": [inline_picture(svg) for svg in figures],
    }


def _rollout(one: RolloutTokens, detail: Detail, task: Task | None) -> dict[str, Any]:
    first = one.views[0]
    verdict = "" if first.reward is None else "right" if first.reward >= 1.0 else "wrong"
    taught = {id(view): place for place, view in enumerate(one.taught)}
    wrong = next((v.first_error for v in one.views if v.first_error is not None), None)
    return {
        "question": first.question,
        "excerpt": shortened(first.question, 90),
        "answer": first.answer,
        "verdict": verdict,
        "reward": None if first.reward is None else f"{first.reward:g}",
        "wrong_step": None if wrong is None else wrong + 1,
        "sample": first.sample + 1,
        "tokens": len(first.spans),
        "data": one.packed(detail),
        "blocks": [
            {
                "context": view.context,
                "problem": view.problem,
                "taught": view.taught,
                "place": taught.get(id(view)),
                "rows": _table_rows(one, view, detail, task) if view.taught else None,
            }
            for view in one.views
        ],
    }


def shortened(text: str, longest: int) -> str:
    """One line of at most `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _table_rows(one: RolloutTokens, view: TokenView, detail: Detail, task: Task | None) -> Markup:
    """The <tr> elements of one context; closing tags that HTML does not need are left out."""
    from markupsafe import Markup

    advantage_T = one.advantages[id(view)]
    level_T = levels(advantage_T, detail.floor)
    html = []
    for left, right in aligned(view, task):
        mark = _mark(view, left)
        name = "" if not (left or right) else _name(left or right)
        html.append(f"<tr class={mark}>" if mark else "<tr>")
        html.append(f"<th>{name}")
        if mark:
            html.append(f"<b>{MARKS[mark]}</b>")
        if left is None:
            html.append("<td class=none>")
        else:
            begin, end = _token_range(one, left)
            html.append(f"<i>Σ A {_signed(float(advantage_T[begin:end].sum()))}</i>")
            html.append(f"<td data-n={end - begin}>")
            for a, b, level in runs(level_T[begin:end]):
                text = escaped("".join(one.texts[begin + a : begin + b]))
                tag = TAGS.get(level)
                html.append(f"<{tag}>{text}</{tag}>" if tag and text else text)
        html.append(_feedback_cell(view, left, right, mark))
    # Markup: texts in it went through `escaped`
    return Markup("".join(html))


def aligned(view: TokenView, task: Task | None) -> Iterator[tuple[Piece | None, Piece | None]]:
    """Pieces of the response and of the feedback with the same number side by side, in order."""
    left = {p.key: p for p in _pieces(view, view.response, None)}
    right = {p.key: p for p in _pieces(view, view.feedback or "", task if view.steps else None)}
    numbers = [key for key in {**left, **right} if isinstance(key, int)]
    for key in (FIRST, *sorted(numbers), LAST):
        if key in left or key in right:
            yield left.get(key), right.get(key)


def _pieces(view: TokenView, text: str, task: Task | None) -> list[Piece]:
    """The text cut into steps; all of it is in some piece.

    White space belongs to the piece before it. A text without steps is one piece.
    """
    if text == view.response and view.steps:
        spans = [(step.start, step.end) for step in view.steps]
    elif task is not None:
        spans = [(step.start, step.end) for step in task.steps(view.question, text)]
    else:
        spans = [(step.start, step.end) for step in parse_steps(text).steps]
    if not spans:
        return [Piece(FIRST, 0, len(text))] if text.strip() else []
    first, last = spans[0][0], spans[-1][1]
    begins = [start for start, _ in spans]
    pieces = []
    if text[:first].strip():
        pieces.append(Piece(FIRST, 0, first))
    else:
        begins[0] = 0
    rest = bool(text[last:].strip())
    ends = [*begins[1:], last if rest else len(text)]
    pieces += [Piece(k, *span) for k, span in enumerate(zip(begins, ends, strict=True), 1)]
    return [*pieces, Piece(LAST, last, len(text))] if rest else pieces


def _token_range(one: RolloutTokens, piece: Piece) -> tuple[int, int]:
    """The tokens that begin in the piece; those that stand behind the last character are its own
    where the piece is the response's last."""
    from bisect import bisect_left

    starts = one.starts[:-1]
    end = len(starts) if piece.end == one.starts[-1] else bisect_left(starts, piece.end)
    return bisect_left(starts, piece.start), end


def _mark(view: TokenView, piece: Piece | None) -> str:
    """ "right", "wrong" (the first one) or "after"; "" where it is not known."""
    if piece is None or not view.steps or piece.key == FIRST:
        return ""
    wrong = view.first_error
    if piece.key == LAST:
        return "" if wrong is None else "after"
    index = int(piece.key) - 1
    if wrong is None:
        return "right"
    return "right" if index < wrong else "wrong" if index == wrong else "after"


def _name(piece: Piece | None) -> str:
    names = {FIRST: "", LAST: "rest"}
    return "" if piece is None else names.get(str(piece.key), f"step {piece.key}")


def _feedback_cell(view: TokenView, left: Piece | None, right: Piece | None, mark: str) -> str:
    if right is None:
        return "<td class=none>"
    text = (view.feedback or "")[right.start : right.end].strip()
    attempt = "" if left is None else view.response[left.start : left.end].strip()
    if text.split() == attempt.split():
        return f"<td class=same>{escaped(text) if len(text) <= REPEATED else 'word for word'}"
    if mark == "wrong":
        return f"<td>{_changed(attempt, text)}"
    return f"<td>{escaped(text)}"


def _changed(old: str, new: str) -> str:
    """The new text with the part in <mark> that differs from the old one, in whole words."""
    limit = min(len(old), len(new))
    head = next((k for k, (a, b) in enumerate(zip_longest(old, new)) if a != b), limit)
    pairs = zip(reversed(old[head:]), reversed(new[head:]), strict=False)
    tail = next((k for k, (a, b) in enumerate(pairs) if a != b), limit - head)
    stop = len(new) - tail
    while head and new[head - 1].isalnum():
        head -= 1
    while stop < len(new) and new[stop].isalnum():
        stop += 1
    middle = f"<mark>{escaped(new[head:stop])}</mark>" if head < stop else ""
    return escaped(new[:head]) + middle + escaped(new[stop:])


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−") if math.isfinite(value) else "–"
