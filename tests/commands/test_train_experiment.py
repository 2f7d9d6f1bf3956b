"""Whole commands: the comparison, your own model and data, exit codes, nothing overwritten."""

import json

import pytest
from tiny_models import build_tiny_llama, build_tiny_qwen3

from fastsd.evaluate import main as evaluate_main
from fastsd.train import main

TINY = [
    *("--optim.steps", "2", "--rollout.prompts-per-step", "3", "--rollout.samples-per-prompt", "4"),
    *("--eval.questions", "6", "--eval.samples", "3", "--eval.every", "0"),
    *("--checkpoint.every", "1"),
]


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_embedded_experiment_compares_three_conditions(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*TINY, "--seeds", "2", "--run", str(run)]) == 0
    line = last_json(capsys)
    conditions = {"base", "grpo", "reference", "critique"}
    assert line["avg_at_3"].keys() == conditions == line["ci95"].keys()
    assert line["seeds"] == 2 and line["run"] == str(run) and line["seconds"] > 0
    for name, (low, high) in line["ci95"].items():
        assert 0 <= low <= line["avg_at_3"][name] <= high <= 100
    children = {f"{name}-seed{seed}" for name in conditions - {"base"} for seed in (0, 1)}
    files = {"summary.json", "report.html", "localisation.json", "config.resolved.toml"}
    assert children | files <= {path.name for path in run.iterdir()}
    where = json.loads((run / "localisation.json").read_text())
    assert where.keys() == {"reference", "critique"}
    assert where["critique"]["share_abs"]["at"] is not None
    page = (run / "report.html").read_text()
    assert "critique" in page and "frozen" in page  # the limits stand beside the result


def test_a_second_run_never_writes_into_a_used_folder(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("x")
    assert main([*TINY, "--condition", "grpo", "--seeds", "1", "--run", str(run)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["precious"]


def test_a_finished_comparison_resumes_to_the_same_line(tmp_path, capsys):
    command = [*TINY, "--seeds", "1", "--run", str(tmp_path / "run"), "--resume", "auto"]
    assert main(command) == 0
    first = last_json(capsys)
    assert main(command) == 0
    again = last_json(capsys)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def own_rows(path, count, offset=0):
    rows = (
        {"task": f"Say {i}", "gold": str(i), "steps": f"It is {i}.\nAnswer: {i}", "source": "mine"}
        for i in range(offset, offset + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("build", "condition", "extra"),
    [
        (build_tiny_llama, "reference", []),
        (build_tiny_llama, "grpo", ["--loss.entropy-weight", "0.01", "--model.dtype", "bfloat16"]),
        (
            build_tiny_qwen3,
            "reference",
            [
                *("--model.lora.r", "4", "--model.lora.alpha", "8"),
                *("--teacher.kind", "adapter_off", "--model.gradient_checkpointing", "true"),
                *("--loss.policy-weight", "0.5", "--optim.micro-batch-tokens", "300"),
            ],
        ),
    ],
)
def test_your_own_model_and_data(build, condition, extra, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    config = tmp_path / "mine.toml"
    config.write_text(
        f"""
condition = "{condition}"
[model]
name = "{build(tmp_path / "model")}"
[data]
train = "{own_rows(tmp_path / "train.jsonl", 7)}"
eval = "{own_rows(tmp_path / "eval.jsonl", 6, offset=100)}"
columns = {{ question = "task", answer = "gold", solution = "steps" }}
[rollout]
max_new_tokens = 12
[reward]
function = "exact"
[optim]
lr = 1e-3
"""
    )
    run = tmp_path / "run"
    assert main([str(config), *TINY, "--run", str(run), *extra]) == 0
    line = last_json(capsys)
    assert line["avg_at_3"].keys() == {"base", condition}
    checkpoint = run / f"{condition}-seed0" / "checkpoint-2"
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert evaluate_main([str(checkpoint)]) == 0
    assert last_json(capsys)["avg_at_3"] == line["avg_at_3"][condition]


def test_bad_data_and_missing_models_end_with_two(tmp_path, capsys):
    rows = own_rows(tmp_path / "rows.jsonl", 3)
    model = str(build_tiny_llama(tmp_path / "model"))
    base = ["--condition", "reference", "--run", str(tmp_path / "run"), "--model.name", model]
    data = ["--data.train", rows, "--data.eval", rows]
    assert main([*base, *data]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl" in error and "question" in error
    columns = ["--data.columns.question", "task", "--data.columns.answer", "gold"]
    assert main([*base, *data, *columns]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl, row 1, solution: missing" in error and '"reference" shows it' in error
    columns += ["--data.columns.solution", "steps"]
    assert main([*base, *data, *columns[:2], *columns[4:]]) == 2
    assert "answer: missing" in capsys.readouterr().err
    assert main([*base[:-1], "/no/such/model", *data, *columns]) == 2
    assert "/no/such/model" in capsys.readouterr().err
    assert main([*base, *data, *columns, "--loss.impl", "triton"]) == 2
    assert "loss.impl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
