"""The page in a real browser: nothing leaves it, text stays text, hover and keys give figures."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np
import pytest
from browser import chromium, require, screenshot, visit
from hostile_tokens import HOSTILE, WHERE, chunks
from report_runs import build_run
from token_views import chain_sum_views, random_views, view_of

from fastsd.evaluation.views import FILE, write_views
from fastsd.reporting.report import write_report
from fastsd.reporting.token_data import TAGS
from fastsd.reporting.tokens import write_token_page
from fastsd.tasks import load_task
from fastsd.types import Step

PANEL = "#token-figures"
# Luminance and contrast as WCAG 2 defines them; every background here is opaque.
CONTRAST = """(selector) => [...document.querySelectorAll(selector)].map((one) => {
  const channels = (color) => color.match(/[0-9.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = channels(color).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = one;
  while (channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const pair = [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor].map(light);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
})"""


@pytest.fixture(scope="module")
def browser():
    require()
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Two rollouts of the embedded task, each under two contexts; the second one is right."""
    right = [
        replace(view, prompt_id="r", reward=1.0, first_error=None, steps=())
        for view in chain_sum_views("00ff")
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    return write_token_page(path, [*chain_sum_views(), *right], WHERE, load_task("chain_sum"))


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory):
    texts = chunks(HOSTILE)
    draw = np.random.default_rng(0).normal(0, 3, len(texts)).tolist()
    view = view_of(
        texts,
        draw,
        question=HOSTILE,
        answer=HOSTILE,
        feedback=HOSTILE,
        context=HOSTILE,
        steps=(Step(0, 41, True), Step(41, len(HOSTILE), False)),
        first_error=1,
        alternatives=(((HOSTILE, -0.1), (HOSTILE, float("-inf"))),) * len(texts),
    )
    path = tmp_path_factory.mktemp("hostile") / "page.html"
    return write_token_page(path, [view], {HOSTILE: WHERE["critique"]})


def token(page, index, block=0):
    return page.locator(".block").nth(block).locator(".t").nth(index)


def panel(page):
    return " ".join(page.locator(PANEL).inner_text().split())


def test_nothing_leaves_the_page_and_nothing_complains(browser, page_file, hostile_file):
    for path in (page_file, hostile_file):
        with visit(browser, path) as seen:
            token(seen.page, 3).hover()
            for summary in seen.page.locator("summary").all():
                summary.click()
            assert [url.split("/")[-1] for url in seen.requests] == ["page.html"]
            assert seen.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_whole_report_opens_quietly(browser, tmp_path, scheme):
    build_run(tmp_path)
    write_views(tmp_path / FILE, chain_sum_views())
    with visit(browser, write_report(tmp_path), color_scheme=scheme) as seen:
        assert len(seen.requests) == 1 and seen.complaints == []
        assert seen.page.locator("svg").count() >= 8
        assert min(seen.page.evaluate(CONTRAST, "h1, h2, p, th, td, li, nav a, .right")) >= 4.5
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        screenshot(seen.page, f"report-{scheme}", full=True)


def test_the_policy_stops_whatever_is_not_the_pages_own(browser, page_file):
    with visit(browser, page_file) as seen:
        done = seen.page.evaluate(
            """async () => {
              const script = document.createElement("script");
              script.textContent = "window.ran = true";
              const style = document.createElement("style");
              style.textContent = "h1 { color: rgb(1, 2, 3) }";
              document.head.append(script, style);
              const fetched = await fetch("https://example.org/").then(() => true, () => false);
              const { color } = getComputedStyle(document.querySelector("h1"));
              return [window.ran === true, fetched, color];
            }"""
        )
        assert done[:2] == [False, False] and done[2] != "rgb(1, 2, 3)"
        assert len(seen.complaints) >= 3


def test_it_can_be_read_without_script(browser, page_file):
    with visit(browser, page_file, wait=False, java_script_enabled=False) as seen:
        page = seen.page
        block = page.locator(".block").nth(1)
        assert block.is_visible() and "e+d=c;" in block.inner_text()
        assert "✗ first wrong" in block.inner_text() and "e+d=b;" in block.inner_text()
        run = block.locator("td u")
        assert run.all_inner_texts() == ["c"]
        assert page.locator("kbd").first.is_hidden() and page.locator(PANEL).is_hidden()
        page.locator("summary").nth(1).click()
        assert page.locator("details").nth(1).locator(".block").first.is_visible()
        assert seen.complaints == []
        screenshot(page, "no-script", full=True)


def test_the_script_colours_tokens_as_the_page_did(browser, page_file):
    with visit(browser, page_file) as seen:
        marked = "(all) => all.map((one) => [one.textContent, one.className.trim()])"
        first, second = (seen.page.locator(".block").nth(k) for k in (0, 1))
        coloured = first.locator(".t:is(.n1, .n2, .n3, .p1, .p2, .p3)").evaluate_all(marked)
        assert coloured == [["b", "t n1"], ["3", "t p1"], ["c", "t n3"], ["c", "t n2"]]
        assert second.locator(".t.n3").evaluate_all(marked) == [["c", "t n3"]]
        assert second.locator(".t").count() == 19


def test_hover_shows_the_figures(browser, page_file):
    with visit(browser, page_file) as seen:
        page = seen.page
        assert page.locator(PANEL).is_hidden()
        token(page, 10).hover()
        shown = panel(page)
        assert shown.startswith("c A −4.50 90 × less likely for the teacher")
        assert re.search(r"log T, teacher −5\.00 0\.7 % log S, solver −0\.500 61 %", shown)
        assert "divergence 0.250 nats entropy of S 0.750 nats token 11 of 19 step 2" in shown
        assert "seeing the reference, prefers x 90 % y 5.0 %" in shown
        assert page.locator(PANEL).get_attribute("aria-live") == "polite"
        # the same token under the other context is pointed out
        assert token(page, 10, block=1).get_attribute("class").split()[-1] == "twin"
        screenshot(page, "token")
        page.mouse.move(5, 5)
        assert page.locator(PANEL).is_hidden()


def test_the_keyboard_walks_tokens_steps_and_contexts(browser, page_file):
    with visit(browser, page_file) as seen:
        page = seen.page
        token(page, 0).focus()
        walk = {
            "ArrowRight": "2 of 19 step 1",
            "ArrowLeft": "1 of 19 step 1",
            "n": "7 of 19 step 2",
            "End": "12 of 19 step 2",
            "Home": "7 of 19 step 2",
            "ArrowDown": "13 of 19 step 3",
            "ArrowUp": "7 of 19 step 2",
            "p": "1 of 19 step 1",
        }
        for key, place in walk.items():
            page.keyboard.press(key)
            assert f"token {place}" in panel(page), key
        page.keyboard.press("ArrowLeft")
        assert "token 1 of 19" in panel(page)
        assert "seeing the reference" in panel(page)
        page.keyboard.press("c")
        assert "seeing the critique" in panel(page) and "A 0 " in panel(page)
        page.keyboard.press("Escape")
        assert page.locator(PANEL).is_hidden()
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        # where the reader was is where Tab comes back to
        assert page.locator(".block").nth(0).locator(".t[tabindex='0']").count() == 1


def test_every_control_is_reached_by_tab(browser, page_file):
    with visit(browser, page_file) as seen:
        page = seen.page
        page.evaluate(
            """() => { window.reached = new Set();
            document.addEventListener("focusin", (e) => window.reached.add(e.target)); }"""
        )
        for _ in range(40):
            page.keyboard.press("Tab")
        missed = page.evaluate(
            """() => [...document.querySelectorAll("a[href], summary, [tabindex='0']")]
            .filter((one) => one.checkVisibility() && !window.reached.has(one))
            .map((one) => one.outerHTML)"""
        )
        assert missed == []
        names = page.locator("[role=region], [role=img], [role=status]").evaluate_all(
            "(all) => all.filter((one) => one.role !== 'status' && !one.ariaLabel).length"
        )
        assert names == 0 and page.locator("html[lang]").count() == 1
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
        assert len(ids) == len(set(ids))
        headings = page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))"
        )
        assert headings.count(1) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_every_colour(browser, page_file, scheme):
    with visit(browser, page_file, color_scheme=scheme) as seen:
        page = seen.page
        token(page, 10).hover()
        for tag in TAGS.values():
            (ratio,) = page.evaluate(CONTRAST, f".scale {tag}")
            assert ratio >= 4.5, (tag, ratio)
        others = ".soft, .steps th b, .steps th i, .same, mark, summary b, a, dt, .t, .panel p"
        worst = min(page.evaluate(CONTRAST, others))
        assert worst >= 4.5
        styles = page.evaluate(
            """(tags) => tags.map((tag) => {
            const style = getComputedStyle(document.querySelector(`.scale ${tag}`));
            const { textDecorationStyle, textDecorationThickness, backgroundColor } = style;
            return [textDecorationStyle, textDecorationThickness, backgroundColor]; })""",
            [TAGS[level] for level in sorted(TAGS)],
        )
        # sign and strength without colour
        assert [style for style, _, _ in styles] == ["solid"] * 3 + ["dotted"] * 3
        assert [size for _, size, _ in styles] == ["3px", "2px", "1px", "1px", "2px", "3px"]
        assert len({color for _, _, color in styles}) == 6
        screenshot(page, f"tokens-{scheme}")


def test_light_and_dark_differ(browser, page_file):
    colors = set()
    for scheme in ("light", "dark"):
        with visit(browser, page_file, color_scheme=scheme) as seen:
            colors.add(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colors) == 2


def test_hostile_text_stays_text(browser, hostile_file):
    with visit(browser, hostile_file) as seen:
        page = seen.page
        clean = HOSTILE.replace("\0", "\ufffd")
        found = page.evaluate(
            "[...document.querySelectorAll('td[data-n]')].map((cell) => cell.textContent).join('')"
        )
        assert found == clean
        tokens = page.evaluate("[...document.querySelectorAll('.t')].map((one) => one.textContent)")
        assert tokens == chunks(clean)
        assert page.locator("script").count() == 1 and page.locator("template").count() == 1
        token(page, 2).hover()
        assert "<script>alert(1)</script>" in page.locator(
            f"{PANEL} code"
        ).first.text_content().replace("␣", " ")
        assert "⟨U+202E⟩" in page.locator(f"{PANEL} code").first.text_content()
        assert page.locator(f"{PANEL} script").count() == 0
        # very long words wrap: nothing is wider than the window
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        screenshot(page, "hostile", full=True)


def test_a_narrow_window_shows_it_all(browser, page_file):
    with visit(browser, page_file, width=390) as seen:
        token(seen.page, 10).click()
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        screenshot(seen.page, "narrow")


@pytest.mark.slow
def test_a_page_of_64_long_rollouts_opens_fast(browser, tmp_path):
    path = write_token_page(tmp_path / "page.html", random_views(64, 2048), WHERE)
    start = time.perf_counter()
    with visit(browser, path) as seen:
        first = time.perf_counter() - start
        start = time.perf_counter()
        seen.page.locator("summary").nth(7).click()
        seen.page.wait_for_selector("details[data-ready] >> nth=1")
        assert time.perf_counter() - start < 5
        assert seen.page.locator("details").nth(7).locator(".t").count() == 2 * 2048
        assert first < 10 and seen.complaints == []
        screenshot(seen.page, "long")
