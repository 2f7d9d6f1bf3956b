"""No test of a critic has the user's key, or waits as long as a user would between attempts."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_key_and_short_pauses(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("fastsd.critics.server._FIRST_PAUSE_S", 0.02)
