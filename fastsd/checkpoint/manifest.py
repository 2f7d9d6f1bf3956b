"""What a checkpoint's files are: listed with size and SHA-256, no pickle among them.

The manifest guards against faults, not against someone who can write into the run folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd.errors import CheckpointError

MANIFEST = "MANIFEST.json"
TRAINER = "trainer"
STATE = "trainer/state.json"
_FORMAT = 1
_PICKLES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest. Reads all of it once.

    Raises CheckpointError naming the folder, the file and what is wrong with it.
    """
    path = Path(path)
    try:
        reason = fault(path)
    except OSError as error:
        reason = f"cannot be read: {error}"
    if reason:
        raise CheckpointError(f"checkpoint {path} is not valid: {reason}")


def write_manifest(temporary: Path, step: int) -> None:
    """Syncs everything in a checkpoint's folder, and lists it. Raises OSError, and CheckpointError
    where there is a pickle."""
    files = _files(temporary)
    for name in files:
        if Path(name).suffix in _PICKLES:
            raise CheckpointError(f"refusing to save {name}: a pickle may run code when it is read")
    entries = []
    for name, file in sorted(files.items()):
        sync(file)
        entries.append({"name": name, "size": file.stat().st_size, "sha256": sha256(file)})
    manifest = {"format": _FORMAT, "step": step, "files": entries}
    (temporary / MANIFEST).write_bytes(_canonical(manifest))
    sync(temporary / MANIFEST)
    for folder, _, _ in os.walk(temporary):
        sync(Path(folder))


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Raises OSError where it cannot be read."""
    files = _files(path)
    pickles = sorted(name for name in files if Path(name).suffix in _PICKLES)
    if pickles:
        return f"it contains {pickles[0]}, and pickles are never read; remove the file"
    if MANIFEST not in files:
        return f"{MANIFEST} is missing: the save was not finished"
    raw = files[MANIFEST].read_bytes()
    try:
        manifest = json.loads(raw)
        entries = {e["name"]: (e["size"], e["sha256"]) for e in manifest["files"]}
        known = (manifest["format"], f"checkpoint-{manifest['step']}") == (_FORMAT, path.name)
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    if not known or raw != _canonical(manifest) or STATE not in entries:
        return f"{MANIFEST} is damaged, or belongs to another step or version"
    # The trainer's tensors are read from whatever files are there.
    strange = sorted(n for n in files if n.startswith(f"{TRAINER}/") and n not in entries)
    if strange:
        return f"{strange[0]} is not in {MANIFEST}; remove the file"
    for name, (size, digest) in entries.items():
        # Names are only looked up among the files that are there: never joined into a path.
        if name not in files:
            return f"{name} is missing"
        found = files[name].stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if sha256(files[name]) != digest:
            return f"{name} does not match its sha256"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """Regular files below folder by relative name; links are not followed."""
    return {
        p.relative_to(folder).as_posix(): p
        for p in folder.rglob("*")
        if p.is_file() and not p.is_symlink()
    }


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, ensure_ascii=True) + "\n").encode("ascii")


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
