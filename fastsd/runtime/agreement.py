"""What all ranks must start with: the same settings, code, weights and questions.

Nodes are machines of their own. A flag that one was not given, an older checkout, another model
under the same path: none of them need fail, for gradients of different models add up as well. So
each rank describes what it has, large things by a digest, and a difference is an error on all of
them before the first update, which names what, the rank, its machine and both values.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError
from fastsd.runtime.world import World

# Network file systems may show a new file late.
SEEN_WITHIN_S = 30.0
_SOURCES = (".py", ".toml", ".j2", ".jinja")
_ABSENT = "not set"


def refuse_other_start(world: World, settings: Mapping[str, Any]) -> None:
    """Raises FastsdError on every rank where one has other settings or another installation.
    Collective."""

    def describe() -> dict[str, Any]:
        return _installation() | dict(_flat(settings))

    refuse_differences(world, describe)


def refuse_own_folders(world: World, run_dir: Path) -> None:
    """Makes the run folder. Raises FastsdError on every rank where one has another folder under
    that name, for each writes its part of a checkpoint there. Collective."""
    if world.size == 1:
        return

    def mark() -> Path:
        run_dir.mkdir(parents=True, exist_ok=True)
        mark = run_dir / f".shared-{uuid.uuid4().hex}"
        mark.touch()
        return mark

    marked = world.lead(mark)
    try:
        world.together(lambda: _wait_for(marked))
    finally:
        if world.leads:
            marked.unlink()


def _wait_for(marked: Path) -> None:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not marked.is_file():
        if time.monotonic() > deadline:
            raise FastsdError(
                f"run = {str(marked.parent)!r} is not the same folder on {platform.node()} as on "
                "rank 0's machine: put it on a file system that all machines share"
            )
        time.sleep(0.2)


def refuse_differences(world: World, describe: Callable[[], Mapping[str, Any]]) -> None:
    """Raises FastsdError on every rank where `describe()`, which gives JSON values by name, gives
    one something else than rank 0. One process is not asked. Collective."""
    if world.size == 1:
        return
    described = world.together(lambda: (platform.node(), dict(describe())))
    first_host, first = described[0]
    for rank, (host, own) in enumerate(described):
        differing = [n for n in first | own if first.get(n, _ABSENT) != own.get(n, _ABSENT)]
        if not differing:
            continue
        name, *others = differing
        more = f" (and {len(others)} more: {_short(', '.join(others))})" if others else ""
        raise FastsdError(
            f"the processes do not start alike: {name} is {_shown(own, name)} on rank {rank} "
            f"({host}) and {_shown(first, name)} on rank 0 ({first_host}){more}; give every node "
            "the same files, flags and installation"
        )


def _installation() -> dict[str, str]:
    import torch
    import transformers

    from fastsd import __version__

    return {
        "fastsd": __version__,
        "fastsd's files": _code_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _code_digest() -> str:
    """Of both packages' sources: a checkout changes without its version."""
    import fastsd
    import fastsd_kernels

    roots = [Path(str(package.__file__)).parent for package in (fastsd, fastsd_kernels)]
    files = [(root.name, path.relative_to(root), path) for root in roots for path in _sources(root)]
    return digest(
        part
        for name, relative, path in sorted(files)
        for part in (f"{name}/{relative.as_posix()}".encode(), path.read_bytes())
    )


def _sources(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.suffix in _SOURCES]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def json_digest(value: Any) -> str:
    """Of a JSON value's text."""
    return digest([json.dumps(value).encode()])


def digest(parts: Iterable[bytes]) -> str:
    """The first 48 bits of SHA-256 over parts and their lengths, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:12]


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return _short(json.dumps(facts[name])) if name in facts else _ABSENT


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
