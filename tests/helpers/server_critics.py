"""Server critics for tests, what they are asked, and plans for `fault_server.FaultServer`."""

from __future__ import annotations

from fault_server import MODEL

from fastsd.config.sections import CriticConfig
from fastsd.critics.server import ServerWriter


def writer(url: str, **settings) -> ServerWriter:
    config = {"url": url, "model": MODEL, "timeout_s": 10.0, "max_tokens": 100, **settings}
    return ServerWriter(CriticConfig(kind="server", **config))


def ask(texts) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def named(fault: str):
    """The questions that begin with the fault's name meet it, always."""
    return lambda text, attempt: fault if text.startswith(fault) else None


def first(fault: str, count: int):
    """The first `count` times that a question is asked meet the fault."""
    return lambda text, attempt: fault if attempt < count else None
