"""Debian's Chromium, driven: what a reader's browser makes of a page.

`python -m tests.browser PAGE.html OUT.png [light|dark]` takes a picture of a page. In tests the
browser is required where FASTSD_REQUIRE_BROWSER=1 says so, else its absence skips them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync "
    "--disable-component-update --no-first-run"
).split()
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"


def missing() -> str | None:
    """Why there is no browser here; None where there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    return None if shutil.which("chromium") else "no chromium on the PATH (apt install chromium)"


def require() -> None:
    """Skips the test without a browser, or fails it where one is required."""
    import pytest

    reason = missing()
    if reason and os.environ.get("FASTSD_REQUIRE_BROWSER") == "1":
        pytest.fail(f"FASTSD_REQUIRE_BROWSER=1, and {reason}")
    if reason:
        pytest.skip(reason)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page in a context of its own, and everything that it asked for or complained about."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextlib.contextmanager
def visit(browser: Any, path: Path, *, wait: bool = True, width: int = 1280, **options: Any):
    """Opens a file; options are playwright's for a context (color_scheme, java_script_enabled).
    wait: until the first rollout is split into tokens."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    found = Visit(context.new_page())
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.on("console", lambda message: found.complaints.append(message.text))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.goto(path.resolve().as_uri())
    if wait:
        found.page.wait_for_selector("details[data-ready]")
    yield found
    context.close()


def screenshot(page: Any, name: str, *, full: bool = False) -> Path:
    """build/screenshots/<name>.png"""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path, full_page=full)
    return path


def main() -> None:
    source, target, scheme = [*sys.argv[1:], "light"][:3]
    with chromium() as browser, visit(browser, Path(source), wait=False, color_scheme=scheme) as v:
        v.page.wait_for_timeout(500)
        v.page.screenshot(path=target, full_page=True)


if __name__ == "__main__":
    main()
