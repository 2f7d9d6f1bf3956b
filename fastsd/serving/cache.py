"""Replies on disk, by content: what was asked of whom decides the file, so a run that is resumed,
or another run that shares the folder, reads what was written before instead of asking again.

    <folder>/ab/abcdef....json     {"request": {"identity", "conversation"}, "reply", "sha256"}

The name is the SHA-256 of the request's canonical JSON; no text decides a path. A file is believed
only where its request is the one asked and its checksum fits. Writers may share the folder: files
appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd.errors import CheckpointError
from fastsd.types import Conversation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What came back for one conversation. text: thinking included; None where nothing arrived, and
    then `failure` is its class ("timeout", "server_error", ...). truncated: it hit max_tokens."""

    text: str | None
    truncated: bool = False
    failure: str | None = None


class ReplyCache:
    """A folder of replies, safe for threads and processes; made at the first `write`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def key(self, identity: dict[str, Any], conversation: Conversation) -> str:
        """The SHA-256 of a request, in hexadecimal."""
        return _sha256({"identity": identity, "conversation": conversation})

    def read(self, key: str) -> Reply | None:
        """The reply kept under a key; None where there is none, or (one warning) a broken one."""
        path = self._path(key)
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            return _warn(path, str(error))
        return _reply(record, key) or _warn(path, "it is not what was kept under this name")

    def write(self, identity: dict[str, Any], conversation: Conversation, reply: Reply) -> None:
        """Keeps a reply that arrived. Raises CheckpointError where the disk does not take it."""
        request = {"identity": identity, "conversation": conversation}
        kept = {"text": reply.text, "truncated": reply.truncated}
        path = self._path(_sha256(request))
        record = {"request": request, "reply": kept, "sha256": _sha256(kept)}
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(record), encoding="ascii")
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise CheckpointError(
                f"cannot keep a critic's reply in {self.folder}: {error.strerror}; make room, or "
                "set critic.cache to another folder"
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _reply(record: Any, key: str) -> Reply | None:
    if not isinstance(record, dict) or _sha256(record.get("request")) != key:
        return None
    kept = record.get("reply")
    if not isinstance(kept, dict) or record.get("sha256") != _sha256(kept):
        return None
    text, truncated = kept.get("text"), kept.get("truncated")
    if not isinstance(text, str) or not isinstance(truncated, bool):
        return None
    return Reply(text, truncated)


def _warn(path: Path, reason: str) -> None:
    log.warning("%s is not used (%s); the critic is asked again", path, reason)


def _sha256(value: Any) -> str:
    """Of the canonical JSON: sorted keys, no white space, ASCII (lone surrogates too)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
