"""The run folder, the summary and the page; every text in them is hostile somewhere below."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from report_runs import BASE, BEST, BETTER, FOUND, PAYLOAD, Page, build_run

from fastsd.evaluation.localisation import Localisation
from fastsd.evaluation.summary import console_table, plain_table, summarise
from fastsd.records.completions import CompletionRow, write_completions
from fastsd.records.folder import (
    MetricsWriter,
    RunFolderError,
    append_evaluation,
    read_evaluations,
    read_metrics,
)
from fastsd.report import main
from fastsd.reporting.model_card import write_model_card
from fastsd.reporting.report import write_report
from fastsd.types import Prompt, Rollout


def test_metrics_are_lines_and_not_finite_numbers_are_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "reward/mean": math.nan, "grad_norm": math.inf})
        # readable while the run goes on
        assert read_metrics(tmp_path)[0]["loss"] == 0.5
        writer.write(2, {"loss": 1})
        assert writer.non_finite == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {"step": 1, "loss": 0.5, "reward/mean": None, "grad_norm": None, "non_finite": 2}
    assert lines == [expected, {"step": 2, "loss": 1.0, "non_finite": 0}]


def test_a_resumed_writer_drops_later_steps_and_a_torn_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    with MetricsWriter(tmp_path, keep_through=2) as writer:
        writer.write(3, {"loss": 30})
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


def test_a_broken_metrics_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnope\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_evaluations_are_kept_by_step(tmp_path):
    for step, result in ((0, BASE), (10, BETTER), (10, BEST)):
        append_evaluation(tmp_path, step, result)
    assert read_evaluations(tmp_path) == [(0, BASE), (10, BEST)]


def test_completions_have_trl_columns(tmp_path):
    prompt = Prompt("q", ({"role": "user", "content": "2+2"},))
    rollouts = [Rollout(prompt, k, (1,), (0.0,), "4", False, r) for k, r in enumerate((1.0, None))]
    rows = [
        CompletionRow(rollouts[0], 0.7, "4 is right", 0.2),
        CompletionRow(rollouts[1], *[None] * 3),
    ]
    path = write_completions(tmp_path, 10, rows, reward_name="exact")
    assert path == tmp_path / "completions" / "completions_00010.parquet"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    table = pq.read_table(path)
    names = ["step", "prompt", "completion", "exact", "advantage", "critique", "divergence"]
    assert table.column_names == names
    first, second = table.to_pylist()
    assert first["prompt"] == [{"role": "user", "content": "2+2"}]
    assert first["completion"] == [{"role": "assistant", "content": "4"}]
    assert (first["step"], first["exact"], first["advantage"], first["divergence"]) == (
        10,
        1,
        0.7,
        0.2,
    )
    assert [second[name] for name in names[3:]] == [None] * 4


def test_summary_pools_seeds_and_pairs_questions():
    summary = summarise({"grpo": [BETTER, BASE], "critique": [BEST, BEST]}, BASE, task="chain_sum")
    json.dumps(summary, allow_nan=False)
    grpo = summary["conditions"]["grpo"]
    assert grpo["by_seed"] == [BETTER.avg_at_k, BASE.avg_at_k]
    assert grpo["pooled"]["avg_at_k"][0] == pytest.approx((BETTER.avg_at_k + BASE.avg_at_k) / 2)
    assert list(summary["differences"]) == ["critique-grpo", "grpo-base", "critique-base"]
    mean, low, high = summary["differences"]["critique-grpo"]
    assert mean == pytest.approx(BEST.avg_at_k - grpo["pooled"]["avg_at_k"][0])
    assert low <= mean <= high
    assert summary["seeds"] == 2 and len(summary["limits"]) > 4


def test_tables_show_scores_differences_localisation_and_limits():
    places = {"critique": FOUND, "[red]x": Localisation()}
    text = plain_table(summarise({"critique": [BEST]}, BASE, localisation=places, task="chain_sum"))
    assert "\x1b" not in text
    assert re.search(r"base +33\.3 \(8\.3 to", text)
    assert re.search(r"critique − base +\+41\.7 \(", text)
    row = next(
        line
        for line in text.splitlines()
        if line.strip().startswith("critique") and "1.500" in line
    )
    assert row.split() == "critique 0.100 1.500 0.500 5.000 90.0 % 93.3 % 25.0 %".split()
    # names are text, not markup; what was not measured is a dash, not a zero
    assert re.search(r"\[red\]x +–", text)
    assert "live teacher the reference" in " ".join(text.split())
    assert console_table(summarise({}, BASE)) is not None


def test_report_shows_the_run(tmp_path):
    build_run(tmp_path)
    assert main([str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = page.text
    assert "33.3 (8.3 to" in text and "critique − grpo" in text and "2 seeds each" in text
    assert "live teacher the reference" in text and "Limits of this result" in text
    # no divergence was logged, no time was taken
    labels = [
        value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"
    ]
    assert labels == [
        "Avg@3 and its 95 % interval",
        "Avg@3 on held-out questions",
        "Reward",
        "Entropy of the solver",
        "Response length",
        "Mean |A| around the first wrong step",
    ]
    assert len(labels) == page.tags.count("svg")
    assert "critique-seed0 3 metric values were not finite numbers" in text
    assert "plain" in text


def test_report_is_self_contained_and_valid_about_ids(tmp_path):
    build_run(tmp_path)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    addresses = [v for _, n, v in page.attributes if n in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith("#") for value in addresses)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html and "prefers-color-scheme: dark" in html
    assert not [name for _, name, _ in page.attributes if name == "style"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for value in addresses} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert targets <= set(ids)


def test_hostile_text_stays_text(tmp_path):
    build_run(tmp_path, PAYLOAD)
    # a context named by somebody else: it reaches a table and the labels of a picture
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["localisation"][PAYLOAD] = FOUND.to_json()
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    # question, response and critique of two samples of two runs; the table and the picture's legend
    assert html.count("&lt;script&gt;alert(1)") == 2 * 2 * 3 + 2
    # the legend shows the beginning of a name only
    assert "".join(page.words).count(PAYLOAD) == 2 * 2 * 3 + 1
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def test_model_card_escapes_html_markdown_and_yaml(tmp_path):
    build_run(tmp_path, PAYLOAD + "\n---\nlicense: mit\n# title [link](javascript:x)")
    card = write_model_card(tmp_path, tmp_path / "critique-seed0" / "checkpoint-3")
    assert card == tmp_path / "README.md"
    text = card.read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text
    assert "\\[link\\](javascript" in text and "\n# title" not in text
    front, body = text.split("---\n")[1:3]
    assert "license" not in front and "base_model" not in front
    assert 'from_pretrained("checkpoint-3")' in body and str(tmp_path) not in text
    assert "optim.lr" in body and "live teacher the reference" in body
    header = body[body.index("| condition | Avg") :].splitlines()
    assert {line.count("|") for line in header[:5]} == {6}
    with pytest.raises(RunFolderError, match="checkpoint folder's name"):
        write_model_card(tmp_path, tmp_path / 'x"); import os #')


def test_model_card_names_a_hub_model(tmp_path):
    build_run(tmp_path, "Qwen/Qwen3-1.7B")
    text = write_model_card(tmp_path, "checkpoint-3").read_text()
    assert text.startswith("---\n") and 'base_model: "Qwen/Qwen3-1.7B"\n' in text


def test_a_single_run_is_its_own_child(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.5})
    (tmp_path / "config.resolved.toml").write_text("condition = 'critique'\n")
    assert "nothing to compare" in write_report(tmp_path).read_text()
    append_evaluation(tmp_path, 0, BASE)
    append_evaluation(tmp_path, 1, BEST)
    assert "critique − base" in Page(write_report(tmp_path).read_text()).text


def test_an_unfinished_comparison_uses_the_evaluations_there_are(tmp_path):
    build_run(tmp_path)
    finished = Page(write_report(tmp_path).read_text()).text
    (tmp_path / "summary.json").unlink()
    page = Page(write_report(tmp_path).read_text())
    assert "critique − grpo" in page.text and "Where the teacher" not in page.text
    (tmp_path / "localisation.json").write_text(json.dumps({"critique": FOUND.to_json()}))
    assert "Where the teacher" in Page(write_report(tmp_path).read_text()).text
    assert "critique − grpo" in finished and "Where the teacher" in finished


def test_what_is_not_a_run_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    build_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"summary\.json: not JSON"):
        write_report(tmp_path / "run")


def test_reading_a_report_module_is_cheap():
    heavy = "{'torch', 'transformers', 'matplotlib', 'pyarrow', 'jinja2'}"
    code = f"import sys, fastsd.report, fastsd.evaluate; sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
