"""On which line of a TOML text each key stands; tomllib parses but does not tell.

A scanner over text that tomllib has accepted already: it may assume that the syntax is valid, and
only has to find where keys and values end. Keys of headers, dotted keys, inline tables and tables
inside arrays are all recorded by their full path, as tomllib would nest them.
"""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY_PART = re.compile(r"""[ \t]*([A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*')[ \t]*""")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})|'
    + r"'''.*?'''(?:'{0,2})|"
    + r'"(?:\\.|[^"\\])*"|'
    + r"'[^']*'",
    re.DOTALL,
)
_PLAIN = re.compile(r"[^,\]}#\r\n]+")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Path of every key and table -> line number from 1. `text` must be valid TOML."""
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.document()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.lines: dict[KeyPath, int] = {}
        self.array_sizes: dict[KeyPath, int] = {}

    def document(self) -> None:
        table: KeyPath = ()
        self._skip(_BLANK)
        while self.position < len(self.text):
            if self.text[self.position] == "[":
                table = self._header()
            else:
                self._assignment(table)
            self._skip(_BLANK)

    def _header(self) -> KeyPath:
        brackets = 2 if self.text.startswith("[[", self.position) else 1
        self.position += brackets
        path: KeyPath = ()
        keys = self._key()
        for depth, key in enumerate(keys, start=1):
            path = (*path, key)
            self._record(path)
            if brackets == 2 and depth == len(keys):
                self.array_sizes[path] = self.array_sizes.get(path, 0) + 1
            if path in self.array_sizes:
                path = (*path, self.array_sizes[path] - 1)
                self._record(path)
        self.position += brackets
        return path

    def _assignment(self, table: KeyPath) -> None:
        path = table
        for key in self._key():
            path = (*path, key)
            self._record(path)
        self.position += 1  # the equals sign
        self._value(path)

    def _key(self) -> list[str]:
        parts = []
        while True:
            match = _KEY_PART.match(self.text, self.position)
            assert match, f"no key at offset {self.position}: the text is not valid TOML"
            self.position = match.end()
            part = match.group(1)
            quoted = part[0] in "\"'"
            parts.append(tomllib.loads(f"key = {part}")["key"] if quoted else part)
            if self.text[self.position] != ".":
                return parts
            self.position += 1

    def _value(self, path: KeyPath) -> None:
        self._skip(_BLANK)
        first = self.text[self.position]
        if first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        else:
            self._skip(_STRING if first in "\"'" else _PLAIN)

    def _array(self, path: KeyPath) -> None:
        self.position += 1
        index = 0
        while not self._closes("]"):
            self._record((*path, index))
            self._value((*path, index))
            index += 1

    def _inline_table(self, path: KeyPath) -> None:
        self.position += 1
        while not self._closes("}"):
            self._assignment(path)

    def _closes(self, bracket: str) -> bool:
        """Skips blanks and a comma; whether the bracket follows, which is then skipped too."""
        self._skip(_BLANK)
        if self.text[self.position] == ",":
            self.position += 1
            self._skip(_BLANK)
        if self.text[self.position] != bracket:
            return False
        self.position += 1
        return True

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.position)
        assert match, f"nothing to skip at offset {self.position}: the text is not valid TOML"
        self.position = match.end()

    def _record(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, self.position) + 1)
