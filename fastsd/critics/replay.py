"""Critiques from a file, by question and response: another run's, another tool's, a person's.

    .parquet   a run's completions (prompt, completion, critique), or a folder of such files
    .jsonl     rows {"question": ..., "response": ..., "critique": ...}

They are looked into like any critic's. An attempt that the file does not have is "not_in_file".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastsd.config.sections import CriticConfig
from fastsd.critics.text import judged
from fastsd.prompts.files import DataError, read_rows
from fastsd.serving.cache import Reply
from fastsd.types import Critique, Reward, Rollout


class ReplayCritic:
    """`fastsd.types.Critic` from critic.file. Raises DataError naming file and row.

    reward, tokenizer: as for TextCritic. Of two critiques for one question and response the later
    one counts; rows without a critique are passed over.
    """

    def __init__(self, config: CriticConfig, reward: Reward | None, tokenizer):
        self.config, self.reward, self.tokenizer = config, reward, tokenizer
        self.critiques = read_critiques(config.file)
        self.name = f"replay ({len(self.critiques)} critiques from {config.file})"

    def critique(self, rollouts: Sequence[Rollout]) -> list[Critique]:
        replies = [self._reply(rollout) for rollout in rollouts]
        return judged(replies, rollouts, self.config, self.reward, self.tokenizer)

    def _reply(self, rollout: Rollout) -> Reply:
        text = self.critiques.get((rollout.prompt.question, rollout.text))
        return Reply(text, failure="not_in_file" if text is None else None)


def read_critiques(name: str) -> dict[tuple[str, str], str]:
    """(question, response) -> critique, of a file or of a folder's .parquet files in name order."""
    path = Path(name)
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise DataError(f"critic.file: the folder {path} holds no .parquet file")
    else:
        files = [path]
    found = {}
    for file in files:
        for question, response, critique in _read(file):
            found[question, response] = critique
    if not found:
        raise DataError(f"critic.file: {path} holds no critique")
    return found


def _read(file: Path) -> Iterator[tuple[str, str, str]]:
    chats = file.suffix == ".parquet"
    names = ("prompt", "completion") if chats else ("question", "response")
    for number, row in read_rows(file):
        where = f"{file}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with columns")
        for name in (*names, "critique"):
            if name not in row:
                wanted = ", ".join((*names, "critique"))
                raise DataError(f"{where}: there is no column {name!r}; expected {wanted}")
        if row["critique"] is None:
            continue
        read = _last_content if chats else _text
        question, response = (read(row[name], f"{where}, {name}") for name in names)
        yield question, response, _text(row["critique"], f"{where}, critique")


def _last_content(messages: Any, where: str) -> str:
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict):
        raise DataError(f"{where}: expected chat messages with role and content")
    return _text(last.get("content"), f"{where}, content")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, found {type(value).__name__}")
    return value
