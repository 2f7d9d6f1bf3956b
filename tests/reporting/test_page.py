"""The shell of a page: its policy knows its own style and script, and pictures carry no styles."""

from __future__ import annotations

import base64
import hashlib
import re

from token_views import chain_sum_views

from fastsd.reporting import plots
from fastsd.reporting.page import escaped, inline_picture
from fastsd.reporting.tokens import write_token_page
from fastsd.tasks import load_task


def test_the_policy_names_the_hashes_of_style_and_script(tmp_path):
    path = write_token_page(tmp_path / "page.html", chain_sum_views(), {}, load_task("chain_sum"))
    html = path.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for name, tag in (("style", "style"), ("script", "script")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert html.index("Content-Security-Policy") < html.index("<style>")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", html)


def test_pictures_have_attributes_in_place_of_styles():
    hostile = 'style="fill: red" <x>'
    svg = plots.bars("bars", "Title", {"critique": {"at": 0.5}, hostile: {"at": 1.0}}, "unit")
    assert "<style" in svg and 'style="fill' in svg
    picture = str(inline_picture(svg))
    assert "<style" not in picture and re.findall(r"<[^>]*style=", picture) == []
    assert 'fill="#1f8fd6"' in picture and "font-family" not in picture
    assert 'style="fill: red" &lt;x&gt;' in picture
    assert 'stroke="currentColor"' in picture
    assert len(picture) < 0.8 * len(svg)
    # older versions of matplotlib write a font in one property
    old = "<text style=\"font: 10px 'A B'; fill: red\"/>"
    assert 'font-size="10px" fill="red"' in str(inline_picture(old))


def test_escaped_text_has_the_characters_that_a_script_will_count():
    assert escaped("a<b>&\"'\r\n\0") == "a&lt;b&gt;&amp;\"'&#13;\n\ufffd"


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path):
    views = [v for v in chain_sum_views("a\ud800b")]
    html = write_token_page(tmp_path / "page.html", views, {}).read_text(encoding="utf-8")
    assert "a?b" in html
