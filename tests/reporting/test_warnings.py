"""What the page warns of, on scripted runs; healthy ones are silent."""

from __future__ import annotations

import numpy as np
import pytest
from report_runs import Page, build_run

from fastsd.records.folder import MetricsWriter
from fastsd.reporting.comparison import read_runs
from fastsd.reporting.report import write_report
from fastsd.reporting.warnings import collapse_signs, left_out, template_notes, warnings_of

HEALTHY = {
    "length/mean": 100.0,
    "length/truncated_share": 0.05,
    "length/repetition": 0.1,
    "entropy/mean": 0.5,
    "reward/mean": 0.4,
}


def script(updates=40, **ends):
    """Lines that go in a straight line from HEALTHY to what `ends` says."""
    ends = {**HEALTHY, **{name.replace("__", "/"): value for name, value in ends.items()}}
    return [
        {
            "step": step + 1,
            **{n: HEALTHY[n] + (ends[n] - HEALTHY[n]) * step / (updates - 1) for n in HEALTHY},
        }
        for step in range(updates)
    ]


@pytest.mark.parametrize(
    ("ends", "sign"),
    [
        ({"length__mean": 1.0}, "responses shrank from"),
        ({"length__mean": 256.0}, "of 256 tokens"),
        ({"length__truncated_share": 1.0}, "% of the responses never stopped"),
        ({"length__repetition": 0.95}, "% of their 4-grams"),
        ({"entropy__mean": 0.0}, "entropy fell from"),
    ],
)
def test_each_collapse_is_called_by_name(ends, sign):
    (found,) = collapse_signs(script(**ends), 256)
    assert sign in found


def test_healthy_runs_are_silent():
    noise = np.random.default_rng(0)
    for ends in ({}, {"entropy__mean": 0.0, "reward__mean": 0.99}, {"length__mean": 60.0}):
        lines = script(**ends)
        for line in lines:
            line["length/mean"] *= noise.uniform(0.8, 1.2)
        assert collapse_signs(lines, 256) == [] and left_out(lines) == []
    # too short to say, and a run whose answers were at the limit from the start
    assert collapse_signs(script(updates=5, length__mean=0.0), 256) == []
    assert collapse_signs(script(length__mean=100.0), 100) == []


def test_what_was_left_out_is_counted():
    lines = [
        {
            "step": step,
            "non_finite": 1,
            "skipped": float(step == 2),
            "feedback/problem/timeout": 2.0,
            "feedback/problem/empty": float(step == 1),
            "feedback/dropped_share": 0.5,
            "feedback/cut_share": 0.05,
            "reward/missing_share": None if step == 1 else 0.25,
            "guard/collapse_length": float(step == 2),
        }
        for step in (1, 2)
    ]
    assert left_out(lines) == [
        "2 metric values were not finite numbers",
        "1 of 2 updates were skipped by a guard",
        "the guard saw signs of collapse: length",
        "critiques without use: empty 1, timeout 4",
        "50% of the rollouts were dropped for their feedback",
        "25% of the rollouts were not scored",
    ]


def test_templates_with_other_arguments_are_a_note():
    notes = template_notes({"teacher_template_kwargs": {"enable_thinking": True}})
    assert len(notes) == 1 and "enable_thinking is unset for the student and True" in notes[0]
    same = {"a": 1}
    assert template_notes({"student_template_kwargs": same, "teacher_template_kwargs": same}) == []


def test_warnings_name_the_seed_and_stand_at_the_top_of_the_page(tmp_path):
    build_run(tmp_path / "run")
    child = tmp_path / "run" / "critique-seed1"
    with MetricsWriter(child, keep_through=0) as writer:
        for line in script(length__mean=1.0):
            writer.write(line["step"], {k: v for k, v in line.items() if k != "step"})
    found = dict(warnings_of(read_runs([tmp_path / "run"])))
    assert list(found) == ["grpo-seed0", "grpo-seed1", "critique-seed0", "critique-seed1"]
    assert "responses shrank" in found["critique-seed1"][0]
    text = Page(write_report(tmp_path / "run").read_text(encoding="utf-8")).text
    assert text.index("responses shrank") < text.index("held-out questions")
