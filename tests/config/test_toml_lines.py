"""The line of every key: all of TOML's syntax by hand, and tomllib as the judge of random trees."""

from __future__ import annotations

import tomllib

import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.config.toml_lines import key_lines

NAMES = st.text(st.characters(codec="utf-8"), max_size=12)


def test_key_lines_on_every_syntax():
    text = "\n".join(
        [
            "# [not.a.table]  key = 1",  # 1
            'a . "b.c" = 1 # x = 2',  # 2
            "",  # 3
            "[ t . 'q' ]",  # 4
            'm = """',  # 5
            "x = 1",
            '[y] \\""""""',  # 7: an escaped quote, then two quotes before the closing three
            "z = '''\\''''",  # 8
            "list = [",  # 9
            "  { k = 1, l.m = '}' }, # ]",  # 10
            "  [ 2, 3 ],",  # 11
            "]",
            "[[rows]]",  # 13
            "v = 1979-05-27 07:32:00",  # 14
            "[[rows]]",  # 15
            "v = 2",  # 16
            "[rows.sub]",  # 17
            "w = { }",  # 18
        ]
    )
    tomllib.loads(text)
    lines = key_lines(text)
    expected = {
        ("a",): 2, ("a", "b.c"): 2, ("t", "q"): 4, ("t", "q", "m"): 5, ("t", "q", "z"): 8,
        ("t", "q", "list"): 9, ("t", "q", "list", 0, "k"): 10, ("t", "q", "list", 0, "l", "m"): 10,
        ("t", "q", "list", 1, 0): 11, ("rows", 0, "v"): 14, ("rows", 1): 15, ("rows", 1, "v"): 16,
        ("rows", 1, "sub", "w"): 18,
    }  # fmt: skip
    assert {path: lines.get(path) for path in expected} == expected
    assert set(lines) == set(_paths(tomllib.loads(text)))


def _paths(value, path: tuple = ()):
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


VALUES = st.recursive(
    st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_key_lines_finds_the_keys_tomllib_finds(tree):
    text = tomli_w.dumps(tree)
    lines = key_lines(text)
    assert set(lines) == set(_paths(tomllib.loads(text)))
    numbered = text.replace("\r\n", "\n").split("\n")
    for path, line in lines.items():
        if isinstance(path[-1], str) and path[-1].isidentifier() and path[-1].isascii():
            assert path[-1] in numbered[line - 1]
