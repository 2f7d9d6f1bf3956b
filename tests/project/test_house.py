"""The rooms of the code: what import-linter cannot see (its contracts run in `make lint`)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from places import ROOT, TESTS

HOUSE = ROOT / "fastsd"
ROOMS = sorted(path.parent.name for path in HOUSE.glob("*/__init__.py"))
COMMANDS = {"train", "evaluate", "report", "advantage", "plan", "data", "doctor", "pretrain"}
VOCABULARY = {"__init__", "types", "errors", "conditions"}
# Folders of tests that are about more than one room.
BESIDE_ROOMS = {"bench", "commands", "data", "helpers", "kernels", "project", "vllm"}


def face(room: str) -> str:
    return ast.get_docstring(ast.parse((HOUSE / room / "__init__.py").read_text())) or ""


def modules_of(room: str) -> set[str]:
    return {path.stem for path in (HOUSE / room).glob("*.py")} - {"__init__"}


def imports(source: str) -> Iterator[tuple[list[str], list[str]]]:
    """(the dotted module in parts, the names taken from it) of every import of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastsd"):
            yield (node.module or "").split("."), [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((n.name.split("."), []) for n in node.names if n.name.startswith("fastsd"))


def test_the_top_holds_commands_and_vocabulary_only():
    assert {path.stem for path in HOUSE.glob("*.py")} == COMMANDS | VOCABULARY
    assert sorted({path.parent.name for path in HOUSE.glob("*/*.py")}) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_face_says_what_goes_in_and_out_and_names_no_module_that_is_gone(room):
    text = face(room)
    assert "In: " in text and "Out: " in text
    named = set(re.findall(r"`(\w+)`", text))
    source = (HOUSE / room / "__init__.py").read_text()
    for name in named - modules_of(room):
        assert re.search(rf"(def|class|import)\b.*\b{name}\b", source), f"{name} is not there"


def faults(source: str, own: str) -> list[str]:
    """What a module of the room `own` imports of that which other rooms keep to themselves."""
    found = []
    for parts, names in imports(source):
        if len(parts) < 2 or parts[1] not in ROOMS or parts[1] == own:
            continue
        modules = set(parts[2:3]) | (
            set(names) & modules_of(parts[1]) if len(parts) == 2 else set()
        )
        hidden = modules - set(re.findall(r"`(\w+)`", face(parts[1])))
        private = {name for name in names if name.startswith("_")}
        found += [f"{own}: {'.'.join(parts[:2])}: {name}" for name in sorted(hidden | private)]
    return found


def test_rooms_take_from_each_other_only_what_faces_name():
    files = list(HOUSE.rglob("*.py"))
    assert [f for p in files for f in faults(p.read_text(), p.relative_to(HOUSE).parts[0])] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from fastsd.critics.validation import check", ["training: fastsd.critics: validation"]),
        ("from fastsd.critics import validation", ["training: fastsd.critics: validation"]),
        ("import fastsd.critics.validation", ["training: fastsd.critics: validation"]),
        ("from fastsd.critics.rule import _best", ["training: fastsd.critics: _best"]),
        ("from fastsd.critics import open_critic", []),
        ("from fastsd.training.loss import _per_token", []),
    ],
)
def test_an_import_past_a_face_is_found(line, found):
    assert faults(line, "training") == found


def test_tests_lie_in_the_room_that_they_are_about():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders - BESIDE_ROOMS <= set(ROOMS)
    assert not list(TESTS.glob("test_*.py"))


@pytest.mark.parametrize(
    "document", ["DESIGN.md", "CONTRIBUTING.md", "README.md", "bench/README.md", "csrc/README.md"]
)
def test_documents_name_files_that_are_there(document):
    roots = [ROOT, HOUSE, ROOT / "bench", ROOT / "kernels" / "fastsd_kernels"]
    folders = ("fastsd", "kernels", "csrc", "bench", "tests", "examples")
    names = set(re.findall(r"[\w/]+\.(?:py|cpp|sh)\b", (ROOT / document).read_text()))
    for name in names - {"kernels/__init__.py"}:  # of which it is said that it must not exist
        below = (path for folder in folders for path in (ROOT / folder).rglob(name))
        assert any((root / name).exists() for root in roots) or any(below), f"{name} is not there"
