"""The per-token part of the page: what is packed, what is aligned, and that texts stay texts."""

from __future__ import annotations

import base64
import json
import math
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hostile_tokens import HOSTILE, WHERE, chunks
from report_runs import build_run
from token_views import CRITIQUE, REFERENCE, chain_sum_views, random_views, view_of

from fastsd.evaluation.views import FILE, write_views
from fastsd.reporting import tokens
from fastsd.reporting.report import write_report
from fastsd.reporting.token_data import (
    DIGITS,
    EDGES,
    NOT_FINITE,
    PRECISIONS,
    TAGS,
    UNIT,
    Detail,
    RolloutTokens,
    TokenDataError,
    fit,
    levels,
    runs,
)
from fastsd.reporting.tokens import aligned, token_section, write_token_page
from fastsd.tasks import load_task
from fastsd.types import Step


def unpacked(text, step):
    """The inverse of RolloutTokens.packed, after the layout that its module describes."""
    plain = text.translate(str.maketrans(".,/", "&<>")).encode()
    data = zlib.decompress(base64.b85decode(plain), -zlib.MAX_WBITS)
    count, views = np.frombuffer(data, "<u4", 2).tolist()
    at, arrays = 8, []
    for _ in range(3 + 2 * views):
        low, high = (np.frombuffer(data, np.uint8, count, at + k * count) for k in (0, 1))
        written = low.astype(np.int64) + 256 * high.astype(np.int64)
        arrays.append(np.where(written % 2, -(written + 1) // 2, written // 2))
        at += 2 * count
    numbers = [np.sign(a) * UNIT * np.expm1(np.abs(a) * step) for a in arrays[1:]]
    numbers = [
        np.where(a == NOT_FINITE, np.nan, n) for a, n in zip(arrays[1:], numbers, strict=True)
    ]
    student, entropy, *rest = numbers
    return arrays[0].tolist(), student, entropy, rest[:views], rest[views:], json.loads(data[at:])


class Cells(HTMLParser):
    """The text of the <td> that hold tokens, and the elements in them."""

    def __init__(self, rows):
        super().__init__()
        self.texts, self.tags, self.inside = [], [], False
        self.feed(f"<table>{rows}</table>")

    def handle_starttag(self, tag, attrs):
        if tag in ("td", "th", "tr"):
            self.inside = tag == "td" and "data-n" in dict(attrs)
            if self.inside:
                self.texts.append("")
        elif self.inside:
            self.tags.append(tag)

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def rows_of(view, task=None, detail=None):
    one = RolloutTokens([view])
    return str(tokens._table_rows(one, view, detail or Detail(), task))


def test_levels_are_symmetric_and_leave_alone_what_is_weak_or_no_number():
    values = [-9, -4, -3.9, -1, -0.25, -0.2, 0, 0.2, 0.25, 1, 4, 9, math.nan, math.inf]
    expected = [-3, -3, -2, -2, -1, 0, 0, 0, 1, 2, 3, 3, 0, 0]
    assert levels(values).tolist() == expected
    assert levels(values, floor=2.0).tolist() == [
        e if abs(v) >= 2 else 0 for v, e in zip(values, expected, strict=True)
    ]
    assert set(TAGS) == set(range(-len(EDGES), len(EDGES) + 1)) - {0}


def test_neighbours_of_one_level_make_one_run():
    assert runs(np.array([0, 0, -1, -1, 2, 0])) == [(0, 2, 0), (2, 4, -1), (4, 5, 2), (5, 6, 0)]
    assert runs(np.array([], np.int8)) == []


@pytest.mark.parametrize("step", [PRECISIONS[0], 0.01, PRECISIONS[-1]])
def test_packed_numbers_come_back_within_half_a_step(step):
    draw = np.random.default_rng(0)
    size = 10.0 ** draw.uniform(-6, 1.6, 400)
    view = view_of(
        chunks("abc" * 400),
        (size * draw.choice([-1, 1], 400)).tolist(),
        entropy=tuple(size.tolist()),
        divergence=tuple(size[::-1].tolist()),
    )
    other = replace(view, context="reference", teacher_logprob=(-1.0,) * 400)
    text = RolloutTokens([view, other]).packed(Detail(step=step))
    assert set(text) <= set(DIGITS) and len(set(DIGITS)) == 85
    lengths, student, entropy, advantages, divergences, alternatives = unpacked(text, step)
    assert lengths == [3] * 400
    half = 1.01 * math.expm1(step / 2)
    close = {"rtol": half, "atol": half * UNIT}
    for found, known in (
        (student, view.student_logprob),
        (entropy, view.entropy),
        (advantages[0], view.advantage),
        (advantages[1], other.advantage),
        (divergences[0], view.divergence),
    ):
        np.testing.assert_allclose(found, known, **close)
    assert alternatives[0]["7"] == ["x", -0.1, "y", -3.0]
    assert len(alternatives) == 2 and len(alternatives[1]) == 400


def test_numbers_that_are_not_finite_are_said_to_be_so():
    view = view_of(["a", "b", "c"], [0.0, -math.inf, math.nan])
    _, student, _, (advantage,), _, kept = unpacked(
        RolloutTokens([view]).packed(Detail()), PRECISIONS[0]
    )
    assert np.isnan(advantage).tolist() == [False, True, True] and not np.isnan(student).any()
    # the teacher's choices stay where A cannot say anything
    one = RolloutTokens([view])
    assert list(json.loads(one.alternatives(1.0))[0]) == ["1", "2"] and len(kept[0]) == 3


def test_texts_cover_the_response_whatever_the_spans():
    # an emoji written by three tokens, a token that writes nothing, a stop token at the end
    view = view_of(
        ["x"] * 6,
        [0.0] * 6,
        response="a\U0001f642bc",
        spans=((0, 1), (1, 2), (1, 2), (1, 2), (2, 4), (4, 4)),
    )
    one = RolloutTokens([view])
    assert one.texts == ["a", "", "", "\U0001f642", "bc", ""]
    lengths, *_ = unpacked(one.packed(Detail()), PRECISIONS[0])
    assert lengths == [1, 0, 0, 2, 2, 0]  # UTF-16, as scripts count


def test_views_of_one_rollout_must_agree_about_its_tokens():
    first = view_of(["a", "b"], [0.0, 0.0])
    with pytest.raises(TokenDataError, match="'q', sample 0: its views under critique, reference"):
        RolloutTokens([first, replace(view_of(["ab"], [0.0]), context="reference")])


def test_steps_stand_beside_the_feedback_of_the_same_number():
    reference, critique = chain_sum_views()
    task = load_task("chain_sum")
    pairs = [
        (critique.response[a.start : a.end], critique.feedback[b.start : b.end])
        for a, b in aligned(critique, task)
    ]
    assert pairs == [("b+3=e;", "b+3=e;"), ("e+d=c;", "e+d=b;"), ("c+2=e;", "b+2=d;")]
    html = rows_of(critique, task)
    assert [html.count(f"<tr class={mark}>") for mark in ("right", "wrong", "after")] == [1, 1, 1]
    assert "✓ right" in html and "✗ first wrong" in html and "↓ after" in html
    assert "Σ A −5.0" in html and "<td class=same>b+3=e;" in html
    assert "e+d=<mark>b</mark>;" in html
    assert len(list(aligned(reference, task))) == 3


def test_without_marked_steps_any_text_is_cut_by_its_own_marks():
    response = "Hm.\nStep 1: a\nStep 2: b\n<answer> 7 </answer> bye"
    feedback = "Step 1: a\nStep 2: c\nStep 3: d\n<answer> 8 </answer>"
    view = view_of(chunks(response), [0.0] * len(chunks(response)), feedback=feedback)
    pairs = list(aligned(view, None))
    keys = [(a and a.key, b and b.key) for a, b in pairs]
    assert keys == [("start", None), (1, 1), (2, 2), (None, 3), ("end", "end")]
    html = rows_of(view)
    assert "first wrong" not in html and "✓" not in html
    assert "".join(Cells(html).texts) == response
    plain = view_of(["no", " steps"], [0.0, 0.0], feedback="none here")
    assert "".join(Cells(rows_of(plain)).texts) == "no steps" and "none here" in rows_of(plain)


def test_a_long_step_that_is_repeated_is_said_not_printed():
    text = "Step 1: " + "x" * 300 + "\nStep 2: y"
    view = view_of(chunks(text), [0.0] * len(chunks(text)), feedback=text.replace("y", "z"))
    html = rows_of(view)
    assert html.count("x" * 290) == 1 and "<td class=same>word for word" in html


def test_colours_follow_the_advantage():
    view = view_of(["a", "b", "c", "d", "e"], [-5.0, -5.0, 0.0, 1.5, -0.3])
    assert "<u>ab</u>c<q>d</q><i>e</i>" in rows_of(view)
    assert "<u>ab</u>c<q>d</q>e" in rows_of(view, detail=Detail(floor=1.0))


def test_hostile_text_stays_text_character_by_character(tmp_path):
    texts = chunks(HOSTILE)
    draw = np.random.default_rng(0).normal(0, 3, len(texts)).tolist()
    steps = (Step(0, 40, True), Step(40, len(HOSTILE), False))
    view = view_of(
        texts,
        draw,
        question=HOSTILE,
        answer=HOSTILE,
        feedback=HOSTILE,
        context=HOSTILE,
        steps=steps,
    )
    view = replace(view, first_error=1, alternatives=(((HOSTILE, -0.1),),) * len(texts))
    cells = Cells(rows_of(view))
    assert "".join(cells.texts) == HOSTILE.replace("\0", "\ufffd")
    assert set(cells.tags) <= set(TAGS.values())
    page = write_token_page(tmp_path / "page.html", [view], {HOSTILE: WHERE["critique"]})
    html = page.read_text(encoding="utf-8")
    assert html.count("<script>") == 1 and html.count("</template>") == 1
    assert "alert(1)</script>" not in html and "{{7*7}}" in html


def test_a_context_that_had_nothing_says_why():
    nothing = dict(feedback=None, problem="timeout", teacher_logprob=(), divergence=())
    view = view_of(["a", "b"], [0.0, 0.0], alternatives=(), **nothing)
    part = token_section([view, view_of(["a", "b"], [0, 0], context="reference")], None)
    (rollout,) = part["rollouts"]
    first, second = rollout["blocks"]
    assert (first["taught"], first["problem"], first["rows"]) == (False, "timeout", None)
    assert second["place"] == 0
    only = token_section([view], None)["rollouts"][0]
    assert unpacked(only["data"], PRECISIONS[0])[0] == [1, 1]


def test_detail_is_left_out_only_where_room_is_short():
    views = random_views(2, 400)
    rollouts = [RolloutTokens(views[:2]), RolloutTokens(views[2:])]
    assert fit(rollouts, 10**6) == Detail()
    small = [fit(rollouts, room) for room in (24_000, 12_000, 7_000, 0)]
    steps = [detail.step for detail in small]
    assert steps == sorted(steps) and steps[0] < steps[-1]
    assert all(a.floor <= b.floor for a, b in zip(small, small[1:], strict=False))
    assert all(a.alternatives <= b.alternatives for a, b in zip(small, small[1:], strict=False))
    for room, detail in zip((24_000, 12_000, 7_000), small, strict=False):
        size = sum(len(one.packed(detail)) for one in rollouts)
        for one in rollouts:
            for view in one.views:
                size += sum(
                    2 * len(TAGS[level]) + 5
                    for _, _, level in runs(levels(view.advantage, detail.floor))
                    if level
                )
        assert size <= room


def test_the_part_keeps_within_its_room(tmp_path):
    views, room = random_views(4, 512), 90_000
    part = token_section(views, None, room)
    rows = sum(len(b["rows"].encode()) for r in part["rollouts"] for b in r["blocks"])
    assert rows + sum(len(r["data"]) for r in part["rollouts"]) <= room
    assert part["detail"].floor < 16


@pytest.mark.slow
def test_a_report_with_64_rollouts_of_2048_tokens_of_noise_takes_less_than_3_MB(tmp_path):
    build_run(tmp_path)
    (tmp_path / "config.resolved.toml").write_text("condition = 'all'\n")  # rows, not a task
    write_views(tmp_path / FILE, random_views(64, 2048))
    page = write_report(tmp_path)
    print(f"{page.stat().st_size:,} bytes")
    assert page.stat().st_size <= 3_000_000
    html = page.read_text(encoding="utf-8")
    assert html.count("<details") == 64 and html.count("<u>") > 100


def test_the_page_has_table_figures_and_views(tmp_path):
    page = write_token_page(
        tmp_path / "advantage.html", chain_sum_views(), WHERE, load_task("chain_sum")
    )
    html = page.read_text(encoding="utf-8")
    assert "<title>advantage · fastsd</title>" in html and "1.500" in html
    assert html.count('<section class="block"') == 2 and html.count("<details open>") == 1
    assert f"{REFERENCE[:6]}" in html and CRITIQUE[:6] in html
    assert html.count("<svg") >= 3 and "style=" not in html
    assert [p.name for p in tmp_path.iterdir()] == ["advantage.html"]
