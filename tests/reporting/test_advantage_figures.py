"""The figures of per-token advantages: their numbers by hand, and that they are whole and safe."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import pytest
from handmade_views import make_view

from fastsd.evaluation.localisation import Localisation
from fastsd.reporting.advantage_figures import drawings, inline_figures, printable, write_figures
from fastsd.reporting.advantage_profile import (
    distributions,
    places,
    profiles,
    shown_response,
    wrong_tokens,
)
from fastsd.types import Step

RIGHT = {"steps": (Step(0, 5, True),), "reward": 1.0}
HOSTILE = "</svg><script>alert(1)</script>&\u202e\x00\x1b$x$"


def test_profile_counts_from_the_first_wrong_token():
    # the wrong step is characters 1 to 3; the second view's begins at character 2
    later = (Step(0, 2, True), Step(2, 4, False))
    views = [
        make_view(advantage=[1.0, -2.0, 3.0, -4.0]),
        make_view(advantage=[5.0, -6.0, 7.0, -8.0], steps=later),
        make_view("reference", advantage=[1.0, 1.0, 1.0, 1.0]),
    ]
    found = profiles(views)
    assert found["critique"] == ([-2, -1, 0, 1, 2], [5.0, 3.5, 4.5, 5.5, 4.0])
    assert found["reference"] == ([-1, 0, 1, 2], [1.0, 1.0, 1.0, 1.0])
    assert wrong_tokens(views) == 2.0


def test_profile_is_binned_and_says_nothing_of_few_responses():
    steps = (Step(0, 500, True), Step(500, 600, False), Step(600, 1000, False))
    long = {"response": "x" * 1000, "steps": steps}
    views = [make_view(advantage=[0.0] * 500 + [2.0] * 500, **long) for _ in range(6)]
    x, values = profiles(views)["critique"]
    width = 9  # 401 tokens in 50 bins
    assert len(x) <= 50 and min(x) >= -205 and max(x) <= 205
    assert [b - a for a, b in zip(x, x[1:], strict=False)] == [width] * (len(x) - 1)
    assert values == [0.0 if at < 0 else 2.0 for at in x]
    alone = make_view(advantage=[9.0] * 40, response="x" * 40, steps=(Step(30, 40, False),))
    short = [make_view() for _ in range(12)]
    assert min(profiles([alone, *short])["critique"][0]) == -1


def test_distributions_tell_places_apart():
    views = [
        make_view(advantage=[1.0, 2.0, 3.0, 4.0]),
        make_view(advantage=[5.0], **RIGHT),
        make_view(advantage=[6.0], **{**RIGHT, "reward": None}),
        make_view(advantage=[7.0], **{**RIGHT, "reward": 0.0}),  # all right, and yet wrong
        make_view(advantage=[8.0], steps=()),
    ]
    assert distributions(views) == {
        "before": {"critique": [1.0, 5.0, 6.0]},
        "at": {"critique": [2.0, 3.0]},
        "after": {"critique": [4.0]},
    }
    assert places(views[0]) == ["before", "at", "at", "after"]


def test_the_response_shown_is_not_chosen_by_its_looks():
    first_step = (Step(0, 2, False),)
    views = [
        make_view(prompt_id="alone"),
        *(make_view(c, prompt_id="at once", steps=first_step) for c in ("reference", "critique")),
        *(make_view(c, prompt_id="this") for c in ("reference", "critique")),
        *(make_view(c, prompt_id="too", advantage=[9.0] * 4) for c in ("reference", "critique")),
    ]
    assert [v.prompt_id for v in shown_response(views)] == ["this", "this"]
    assert [v.prompt_id for v in shown_response(views[:3])] == ["at once", "at once"]


def both(**fields):
    return [make_view(context, **fields) for context in ("reference", "critique")]


def test_figures_are_written_as_svg_and_png(tmp_path):
    paths = write_figures(tmp_path, [*both(), *both(prompt_id="q1", **RIGHT)])
    names = ("response", "profile", "distribution")
    assert paths == [
        tmp_path / "figures" / f"{name}.{suffix}" for name in names for suffix in ("svg", "png")
    ]
    assert sorted((tmp_path / "figures").iterdir()) == sorted(paths)
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            continue
        text = " ".join(ET.fromstring(path.read_text()).itertext())
        assert "log T − log S" in text
        assert ("reference" in text and "critique" in text) and "first wrong step" in text
    before = [path.read_bytes() for path in paths]
    assert write_figures(tmp_path, [*both(), *both(prompt_id="q1", **RIGHT)]) == paths
    assert [path.read_bytes() for path in paths] == before


def test_inline_figures_take_the_pages_colours_and_say_how_much_they_show():
    svgs = inline_figures(both(), {"critique": Localisation(wrong_responses=131)})
    assert len(svgs) == 3
    for svg in svgs:
        ET.fromstring(svg)
        assert svg.startswith("<svg role=") and "currentColor" in svg and "#010203" not in svg
        assert "<script" not in svg and 'href="http' not in svg.replace("http://www.w3.org", "")
    assert "1 of 131 wrong responses" in svgs[1] and "1 of 131" in svgs[2]
    assert (
        "of 1 wrong" not in inline_figures(both(), {"critique": Localisation(wrong_responses=1)})[1]
    )
    assert "wrong responses" not in inline_figures(both())[1]


def test_figures_only_where_there_is_data(tmp_path):
    assert write_figures(tmp_path, []) == [] and inline_figures([], {}) == []
    assert write_figures(tmp_path, both(problem="timeout")) == []
    assert write_figures(tmp_path, both(steps=())) == []
    assert [one.name for one in drawings(both(**RIGHT))] == ["distribution"]
    assert not (tmp_path / "figures").exists()


def test_text_of_the_data_stays_text(tmp_path):
    response = f"{HOSTILE} 我\n"
    steps = (Step(0, 3, True), Step(3, len(response), False))
    values = [0.5, -1.0] * (len(response) // 2)
    views = [
        make_view(context, values, response=response, steps=steps)
        for context in ("critique", HOSTILE)
    ]
    for svg in inline_figures(views):
        tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(svg).iter()}
        assert "script" not in tags
        assert not {"\u202e", "\x00", "\x1b"} & set(svg)
    write_figures(tmp_path, views)
    assert printable("a\nb\tc\x00\u202e", 9) == "a↵b→c··"
    assert printable("x" * 50, 8) == "xxxxxxx…" and printable(" ", 8) == "␣"


def test_long_responses_make_small_pictures():
    rng = random.Random(0)
    steps = tuple(Step(k, k + 64, k + 64 < 1500) for k in range(0, 2048, 64))
    views = [
        view
        for number in range(8)
        for view in both(
            advantage=[rng.gauss(0, 3) for _ in range(2048)],
            response="x" * 2048,
            steps=steps,
            prompt_id=f"q{number}",
        )
    ]
    assert sum(map(len, inline_figures(views))) < 500_000


@pytest.mark.parametrize("advantage", [[0.0] * 4, [-0.01] * 4, [50.0, -60.0, 0.1, 0.0]])
def test_any_size_of_advantage_can_be_drawn(advantage):
    assert len(inline_figures(both(advantage=advantage))) == 3
