"""Steps are found in whatever form a solver writes, in linear time, and never with an exception."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastsd.tasks.steps import STEP_INSTRUCTION, format_obeyed, parse_steps

# (text, form, bodies, answer text)
TEXTS = [
    ("<step_1>a b</step_1>\n<step_2>\nc\n</step_2>\n<answer> \\boxed{3} </answer>",
     "tags", ["a b", "c"], "<answer> \\boxed{3} </answer>"),
    # Unclosed, mis-numbered, nested-looking, mixed case, without a number, text around them.
    ("Well: <STEP_1> a\n<Step 7>b</step_9> loose <step-2>c <step_3> d </step_3> </step_2>\n<step>e",
     "tags", ["a", "b", "c", "d", "e"], None),
    ("<step_1>a</step_1><answer>4</answer> bye", "tags", ["a"], "<answer>4</answer>"),
    ("<step_1>a\n<answer>4", "tags", ["a"], "<answer>4"),
    ("<step_1>so <answer>3</answer> no</step_1>\n<answer>4</answer>", "tags",
     ["so <answer>3</answer> no"], "<answer>4</answer>"),
    ("<answer>4</answer>\n<step_1>a</step_1>", "tags", ["a"], "<answer>4</answer>"),
    ("<step_1></step_1><step_2> </step_2><step_3>c</step_3>", "tags", ["c"], None),
    ("Let us see.\nStep 1: a\nmore\n\nStep 2. b\nstep 3 - c\nFinal Answer: 5",
     "step", ["a\nmore", "b", "c"], "Final Answer: 5"),
    ("**Step 1**\na\n**Step 2:** b\n### Step 3: Title\nc\n__Step 4.__ d\n> Step 5) e\n",
     "step", ["a", "b", "Title\nc", "d", "e"], None),
    ("Step 1: a\nStep 2 of it is fun\nStep 3: c", "step", ["a\nStep 2 of it is fun", "c"], None),
    ("Step 1: a\n### Final Answer\n\n$5$", "step", ["a"], "### Final Answer\n\n$5$"),
    ("Plan\n1. a\n2. b\n   1. x\n   2. y\n3. c 3.14\n2024. z\n**Answer**: 5",
     "numbered", ["a", "b\n   1. x\n   2. y", "c 3.14\n2024. z"], "**Answer**: 5"),
    ("1) a\n2) b", "numbered", ["a", "b"], None),
    ("(1) a\n(2) b\n(9) c", "numbered", ["a", "b\n(9) c"], None),
    ("0. a\n1. b\n2. c", "numbered", ["a", "b", "c"], None),
    ("**1.** a\n**2.** b", "numbered", ["a", "b"], None),
    ("1. go\n2. on\n\n1. a\n2. b\n3. c", "numbered", ["a", "b", "c"], None),
    ("3.14 is pi\n2.71 is e", "paragraphs", ["3.14 is pi", "2.71 is e"], None),
    ("1.5 is a half more\n2.5 too", "paragraphs", ["1.5 is a half more", "2.5 too"], None),
    ("2019. was\n2020. was", "paragraphs", ["2019. was", "2020. was"], None),
    ("1. only one", "paragraphs", ["1. only one"], None),
    ("a\nb\n\n \t\nc\r\n\r\nd\n\nAnswer: 4\n\nBye", "paragraphs", ["a\nb", "c", "d"],
     "Answer: 4\n\nBye"),
    ("12+7=19\n19+25=44\nAnswer: 44", "paragraphs", ["12+7=19", "19+25=44"], "Answer: 44"),
    ("one line", "paragraphs", ["one line"], None),
    ("The answer is 4.", "paragraphs", ["The answer is 4."], None),
    ("Answer: 4", "none", [], "Answer: 4"),
    ("", "none", [], None),
    (" \n\n\t", "none", [], None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "form", "bodies", "answer"), TEXTS)
def test_steps_of_every_form(text, form, bodies, answer):
    parsed = parse_steps(text)
    assert parsed.form == form
    assert [step.body for step in parsed.steps] == bodies
    assert answer == (parsed.answer and text[slice(*parsed.answer)])


def test_spans_hold_the_marks_and_leave_out_what_stands_between_tags():
    text = "Hm. <step_1>a</step_1> well\n<step_2>b <answer>4</answer>"
    steps = parse_steps(text).steps
    assert [text[s.start : s.end] for s in steps] == ["<step_1>a</step_1>", "<step_2>b "]
    text = "Hm.\nStep 1: a\n\n**Step 2:** b\n"
    assert [text[s.start : s.end] for s in parse_steps(text).steps] == [
        "Step 1: a\n\n",
        "**Step 2:** b\n",
    ]


def test_the_same_steps_in_another_form_have_the_same_bodies():
    bodies = ["12 + 7 = 19", "so 19 + 25 = 44"]
    for mark in ("<step_{}>", "Step {}: ", "**Step {}:** ", "### Step {}\n", "{}. ", "({}) "):
        text = "\n".join(mark.format(k) + body for k, body in enumerate(bodies, 1))
        assert [step.body for step in parse_steps(text).steps] == bodies, mark


PIECES = st.sampled_from(
    [*("<step_1>", "</step_1>", "<STEP 2", ">", "Step 3:", "**", "### ", "1. ", "(2)", "2) "),
     *("<answer>", "</answer>", "Answer:", "\\boxed{4}", "\n", "\r\n", "\n\n", " ", "\t", "x", "9"),
     *("\ud800", "\x00", "\u2028", "\u0661. ", "<", "/")]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join))
@example("<step_1><answer></step_1>")
@example("Answer:\n\nStep 1: a\nAnswer:")
def test_any_text_has_ordered_steps_that_do_not_overlap(text):
    parsed = parse_steps(text)
    edges = [edge for step in parsed.steps for edge in (step.start, step.end)]
    assert edges == sorted(edges) and all(0 <= edge <= len(text) for edge in edges)
    for step in parsed.steps:
        assert step.body and step.body in text[step.start : step.end]
    if parsed.answer:
        start, end = parsed.answer
        assert start < end and all(s.end <= start or s.start >= end for s in parsed.steps)
    assert (parsed.form == "none") == (parsed.steps == ())
    for form in ("tags", "steps", "any"):
        assert isinstance(format_obeyed(text, form), bool)


HOSTILE = ["<step_1>", "<step_1", "</step_1>", "Step 1:\n", "Step 1 ", "\n", "\t\n", "1. a\n",
           "*", "1) \n2) \n", " #", "the ", "the final answer\n", "<answer>", "\n  \r", "a\n\n",
]  # fmt: skip


def seconds(unit: str, characters: int) -> float:
    text = (unit * (characters // len(unit) + 1))[:characters]
    start = time.process_time()
    parse_steps(text)
    format_obeyed(text, "tags")
    return time.process_time() - start


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_takes_linear_time(unit):
    # What is quadratic takes minutes for this.
    assert seconds(unit, 100_000) < 2


def test_a_megabyte_takes_seconds():
    assert seconds("<step_1>x</step_2> Step 3: 4. \n", 1_000_000) < 10


@pytest.mark.parametrize(
    ("text", "tags", "steps"),
    [
        ("<step_1> a </step_1>\n<step_2> b </step_2>\n<answer> \\boxed{4} </answer>", True, True),
        ("<step_1>a</step_1> <answer>4", True, True),
        ("<step_1>a</step_1>", False, True),
        ("<step_1>a <answer>4</answer>", False, True),
        ("<step_2>a</step_2> <answer>4</answer>", False, True),
        ("<step_1>a</step_2> <answer>4</answer>", False, True),
        ("<step_1><step_2>a</step_2></step_1> <answer>4</answer>", False, True),
        ("<step_1></step_1> <answer>4</answer>", False, False),
        ("<answer>4</answer> <step_1>a</step_1>", False, True),
        ("Step 1: a\nStep 2: b\nAnswer: 4", False, True),
        ("1. a\n2. b\nAnswer: 4", False, True),
        ("a\n\nb\n\nAnswer: 4", False, False),
        ("", False, False),
    ],
)
def test_format_obeyed(text, tags, steps):
    assert format_obeyed(text, "tags") is tags
    assert format_obeyed(text, "steps") is steps
    assert format_obeyed(text, "any") is True


def test_the_instruction_asks_for_what_the_parser_reads():
    parsed = parse_steps(STEP_INSTRUCTION)
    assert parsed.form == "tags" and parsed.answer is not None
    assert "\\boxed{...}" in STEP_INSTRUCTION
