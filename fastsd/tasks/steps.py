"""The steps of a response, read from any text: what a critique is aligned by.

Solvers are asked for `<step_1> ... </step_1>`, and write what they like. The first of these forms
that a text has is its form:

    tags        <step_1> ... </step_1>, unclosed, mis-numbered, in any case
    step        lines that begin with "Step 3:", "**Step 3**", "### Step 3"
    numbered    lines that begin with "3.", "3)", "(3)" and count up from 1 (or 0)
    paragraphs  what blank lines part; with none, each line (12+7=19 needs no blank line)

Marks cut the text: a step goes from its mark to the next, a tagged one to its closing tag at most.
The last `<answer>` or line "Answer:" is a mark too, and begins the answer. Every pattern is bounded
and scanned once: time is linear in the length of a text that nobody vouches for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

STEP_INSTRUCTION = (
    "Solve the problem in numbered steps. Write each step as <step_1> ... </step_1>, "
    "<step_2> ... </step_2> and so on, one step a line. Then write the final answer, and nothing "
    "else, as <answer> \\boxed{...} </answer>."
)

Form = Literal["tags", "step", "numbered", "paragraphs", "none"]


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class TextStep:
    """One step: characters [start, end) with its marks, and the text within them, stripped."""

    start: int
    end: int
    body: str


@dataclass(frozen=True)
class ParsedSteps:
    """A text's steps in order, without empty ones. answer: where its final answer stands."""

    form: Form
    steps: tuple[TextStep, ...]
    answer: Span | None


class _Mark(NamedTuple):
    """Where a step or the answer begins; its text begins at `body`; number -1: the answer."""

    start: int
    body: int
    number: int


_ANSWER = -1
_TAG = re.compile(r"<(/?)step[ _-]?([0-9]{0,4})>", re.IGNORECASE)
_EMPHASIS = r"[ \t]{0,8}(?:[#>*_-]{1,6}[ \t]{0,3}){0,2}"
_HEADING = re.compile(
    rf"^{_EMPHASIS}step[ \t]{{0,3}}([0-9]{{1,4}})"
    r"(?:[ \t]{0,3}[:.)*_\u2013\u2014-]{1,4}|[ \t\r]{0,8}$)",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBER = re.compile(
    r"^([ \t]{0,8}(?:#{1,6} |\*\*)?)(?:\(([0-9]{1,3})\)|([0-9]{1,3})([.)]))(?=[\s*])", re.MULTILINE
)
_ANSWER_MARK = re.compile(
    rf"<answer>|^{_EMPHASIS}(?:the[ \t]{{1,3}})?(?:final[ \t]{{1,3}})?answer[ \t*_]{{0,4}}"
    r"(?::|[ \t\r]{0,8}$)",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWER_CLOSING = re.compile("</answer>", re.IGNORECASE)


def parse_steps(text: str) -> ParsedSteps:
    """The steps of any text, in linear time; never raises."""
    answer = _answer_mark(text)
    form, marks = _marks(text, answer)
    steps, span = _cut(text, form, marks, answer)
    return ParsedSteps(form if steps else "none", steps, span)


def format_obeyed(text: str, form: Literal["tags", "steps", "any"]) -> bool:
    """Whether a response has the form that it was asked for.

    tags: `<step_1> ... </step_1>` counting up from 1, each closed before the next, then an answer.
    steps: tags however written, "Step k:" or numbered lines. any: whatever it has.
    """
    if form == "any":
        return True
    parsed = parse_steps(text)
    if form == "steps":
        return parsed.form in ("tags", "step", "numbered")
    tags = [(match[1], match[2]) for match in _TAG.finditer(text)]
    wanted = [(slash, str(k + 1)) for k in range(len(tags) // 2) for slash in ("", "/")]
    closed_in_order = bool(tags) and tags == wanted and len(parsed.steps) == len(tags) // 2
    return (
        closed_in_order and parsed.answer is not None and parsed.answer[0] >= parsed.steps[-1].end
    )


def _marks(text: str, answer: _Mark | None) -> tuple[Form, list[_Mark]]:
    if tags := [_Mark(m.start(), m.end(), int(m[2] or 0)) for m in _TAG.finditer(text) if not m[1]]:
        return "tags", tags
    if headings := [_Mark(m.start(), m.end(), int(m[1])) for m in _HEADING.finditer(text)]:
        return "step", headings
    if numbered := _numbered_marks(text):
        return "numbered", numbered
    return "paragraphs", _paragraph_marks(text, answer.start if answer else len(text))


def _cut(
    text: str, form: Form, marks: list[_Mark], answer: _Mark | None
) -> tuple[tuple[TextStep, ...], Span | None]:
    """The text cut at the marks; what has no text of its own is no step."""
    closings = [m for m in _TAG.finditer(text) if m[1]] if form == "tags" else []
    ordered = sorted([*marks, answer] if answer else marks)
    steps, span, at = [], None, 0
    for index, mark in enumerate(ordered):
        end = ordered[index + 1].start if index + 1 < len(ordered) else len(text)
        if mark.number == _ANSWER:
            span = _answer_span(text, mark, end)
            continue
        while at < len(closings) and closings[at].start() < mark.body:
            at += 1
        inner = end
        if at < len(closings) and closings[at].end() <= end:
            inner, end = closings[at].span()
        if body := text[mark.body : inner].strip(" \t\r\n*_"):
            steps.append(TextStep(mark.start, end, body))
    return tuple(steps), span


def _answer_mark(text: str) -> _Mark | None:
    matches = [*_ANSWER_MARK.finditer(text)]
    return _Mark(matches[-1].start(), matches[-1].end(), _ANSWER) if matches else None


def _answer_span(text: str, mark: _Mark, end: int) -> Span:
    closing = _ANSWER_CLOSING.search(text, mark.body, end)
    return Span(mark.start, closing.end() if closing else end)


def _numbered_marks(text: str) -> list[_Mark]:
    """The longest run of lines in one style that counts up from 1 or 0; the first of equals.

    Style is indentation and punctuation: the items of a list inside a step are not steps.
    """
    best: list[_Mark] = []
    runs: dict[tuple, list[_Mark]] = {}
    for match in _NUMBER.finditer(text):
        style = (match[1], match[4])
        mark = _Mark(match.start(), match.end(), int(match[2] or match[3]))
        run = runs.get(style, [])
        if run and mark.number == run[-1].number + 1:
            run.append(mark)
        elif mark.number <= 1:
            run = runs[style] = [mark]
        if len(run) > max(len(best), 1):
            best = run
    return best


def _paragraph_marks(text: str, end: int) -> list[_Mark]:
    """Where paragraphs begin in text[:end], or lines if there is one paragraph only."""
    lines, paragraphs, at, after_blank = [], [], 0, True
    for line in text[:end].split("\n"):
        blank = not line.strip()
        if not blank:
            lines.append(_Mark(at, at, len(lines)))
            if after_blank:
                paragraphs.append(lines[-1])
        after_blank = blank
        at += len(line) + 1
    return paragraphs if len(paragraphs) > 1 else lines
