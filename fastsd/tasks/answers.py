r"""The final answer of a response, as text.

It is what follows the last of these marks, else the whole response:

    \boxed{...}      <answer> ... </answer>      Answer: ... (to the end of the line)

Everything here is linear in the length of the text, which is untrusted.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_MARK = re.compile(r"\\boxed\s*\{|<answer>|\banswer\s*:", re.IGNORECASE)
_CLOSING = re.compile("</answer>", re.IGNORECASE)


def extract_answer(text: str) -> str:
    r"""What follows the last \boxed{, <answer> or "Answer:" of a response, else all of it."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return text.strip()
    rest = text[marks[-1].end() :]
    mark = marks[-1].group()
    if mark.startswith("\\"):
        return _braced(rest).strip()
    if mark.startswith("<"):
        return _CLOSING.split(rest, maxsplit=1)[0].strip()
    return _plain(rest.strip().split("\n", 1)[0])


def _braced(rest: str) -> str:
    """Up to the brace that closes one already open; all of it where none does."""
    depth = 1
    for brace in re.finditer(r"\\[{}]|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return rest[: brace.start()]
    return rest


def _plain(text: str) -> str:
    """Without the emphasis, dollar signs or full stop around an answer."""
    return text.strip("* \t").removesuffix(".").strip("* \t")


def folded(text: str) -> str:
    """What exact comparison looks at: NFKC, single spaces, no case, no dollar signs around."""
    text = " ".join(unicodedata.normalize("NFKC", _plain(text)).split())
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text.casefold()


def completion_text(completion: Any) -> str:
    """The text of a completion: a message list (conversational) or a string."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
