"""What would end a run late ends it before the first rollout, or is cut and counted."""

import json
from pathlib import Path

import pytest
from small_runs import small_config
from tiny_models import CHATML_TEMPLATE, build_tiny_llama
from transformers import AutoTokenizer

from fastsd.config import Config
from fastsd.config.sections import PromptConfig
from fastsd.errors import FastsdError
from fastsd.prompts.render import PromptError, PromptRenderer
from fastsd.train import main, update
from fastsd.training.session import Session
from fastsd.types import Prompt, common_prefix

# As some models' templates do, another system text with thinking on.
THINKS_FIRST = (
    "{{ '<|im_start|>system\n/' + ('think' if enable_thinking else 'no_think') + '<|im_end|>\n' }}"
    + CHATML_TEMPLATE
)
KWARGS = {
    "student_template_kwargs": {"enable_thinking": False},
    "teacher_template_kwargs": {"enable_thinking": True},
}


def own_config(tmp_path, questions, **overrides):
    """reference on a tiny Llama with 2048 positions and these questions."""
    rows = [{"question": q, "answer": "1", "solution": "so 1\nand 2\n" * 3} for q in questions]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(build_tiny_llama(tmp_path / "model"))
    tree = {
        "condition": "reference",
        "model": {"name": model, "dtype": "float32"},
        "data": {"train": str(path), "eval": str(path)},
        "reward": {"function": "exact"},
        "rollout": {"max_new_tokens": 12, "samples_per_prompt": 2},
        "optim": {"steps": 2},
    }
    return Config(**{**tree, **overrides})


def test_a_question_that_does_not_fit_ends_the_run_before_it_starts(tmp_path):
    questions = ["What is 1?", "What is 2?", "word " * 700]
    with pytest.raises(PromptError, match=r"rows.jsonl:3' has \d+ tokens, and 2036 fit into the"):
        Session(own_config(tmp_path, questions), tmp_path / "run")
    config = own_config(tmp_path, questions, prompt={"max_prompt_tokens": 100})
    with pytest.raises(PromptError, match="rows.jsonl:3' has .* prompt.max_prompt_tokens is 100"):
        Session(config, tmp_path / "run")
    with pytest.raises(FastsdError, match="2049 tokens .* lower rollout.max_new_tokens"):
        Session(own_config(tmp_path, questions[:2], rollout={"max_new_tokens": 2048}), tmp_path)
    Session(own_config(tmp_path, questions[:2]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_feedback_is_cut_to_the_positions_that_are_left(tmp_path):
    def teacher_prompt(**overrides):
        session = Session(own_config(tmp_path, ["What is 1 and 2?"], **overrides), tmp_path)
        [asked] = session.train_data.take(0, 1, seed=0)
        return session, session.renderer.teacher(asked, session.maker.template, asked.solution)

    _, whole = teacher_prompt()
    assert not whole.cut
    response = 2048 - len(whole.ids) + 5  # five tokens too many
    rollout = {"max_new_tokens": response, "samples_per_prompt": 2}
    session, cut = teacher_prompt(rollout=rollout)
    assert cut.cut and 2048 - response - 10 < len(cut.ids) <= 2048 - response
    text = session.policy.tokenizer.decode(cut.ids)
    assert (text.count("so 1\n"), text.count("and 2\n")) == (3, 2)  # the last line is gone
    with pytest.raises(PromptError, match=r"the \d+ tokens that the model has room for"):
        teacher_prompt(rollout=rollout, prompt={"feedback_overflow": "error"})


def test_feedback_without_any_room_means_no_teacher(tmp_path):
    # 256 positions, questions of 7 tokens: 6 left for feedback, and a critique is one line.
    config = small_config("critique", rollout={"max_new_tokens": 243})
    session = Session(config, tmp_path)
    samples = session.next_samples()
    assert all(s.teacher_ids is None and s.feedback_cut for s in samples if s.feedback.text)
    metrics = update(session, samples).metrics()
    assert metrics["feedback/cut_share"] > 0.5 and metrics["skipped"] == 1.0


def renderer(tmp_path, template=CHATML_TEMPLATE, **config):
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_llama(tmp_path))
    tokenizer.chat_template = template
    return PromptRenderer(tokenizer, PromptConfig(**config))


def prompt(text):
    return Prompt("p", ({"role": "user", "content": text},))


def test_a_chat_template_that_changes_the_beginning_is_refused(tmp_path):
    template = PromptConfig().critique_template
    renderer(tmp_path, THINKS_FIRST).check_template(template, like=prompt("x"))
    with pytest.raises(PromptError, match="prompt.teacher_template_kwargs"):
        renderer(tmp_path, THINKS_FIRST, **KWARGS).check_template(template, like=prompt("x"))


def test_feedback_before_the_question_is_refused(tmp_path):
    """The configuration refuses such a template first; this is what would catch its prompts."""
    render = renderer(tmp_path)
    with pytest.raises(PromptError, match="not the .* through the question"):
        render.check_template("A hint: {feedback}\n{question}", like=prompt("x"))
    asked = prompt("What is 1 and 2?")
    student = render.student(asked)
    tokens = render.question_tokens(asked, student)
    teacher = render.teacher(asked, "{question} {feedback}", "so 1").ids
    render.check_shared(asked, tokens, student, teacher)
    last = render.tokenizer.decode(student[tokens:])
    assert last.startswith(" 2?") and common_prefix([student, teacher])[:tokens] == student[:tokens]
    with pytest.raises(PromptError, match="'p': .* shares only its first"):
        render.check_shared(asked, tokens, student, teacher[: tokens - 1])


def test_every_condition_is_checked_before_the_first_trains(tmp_path, capsys):
    model = build_tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").write_text(THINKS_FIRST)
    config = tmp_path / "mine.toml"
    config.write_text(
        f"""
condition = "all"
run = "{tmp_path / "run"}"
[model]
name = "{model}"
[data]
task = "chain_sum"
[rollout]
max_new_tokens = 12
[reward]
function = "task"
[prompt.student_template_kwargs]
enable_thinking = false
[prompt.teacher_template_kwargs]
enable_thinking = true
"""
    )
    assert main([str(config)]) == 2
    assert "shares only its first" in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()


def test_a_task_without_solutions_cannot_run_the_reference_condition(tmp_path):
    settings = {"dataset": "leg_counting", "seed": 0}
    config = own_config(
        tmp_path, ["What is 1?"], data={"task": "reasoning_gym", "task_options": settings}
    )
    with pytest.raises(FastsdError, match="has no solution, but condition = .reference. shows it"):
        Session(config, tmp_path / "run")
