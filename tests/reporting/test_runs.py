"""Several run folders on one page: names, pairs, what stands side by side, curves and phases."""

from __future__ import annotations

import json
import re

import pytest
from report_runs import BASE, BEST, BETTER, FOUND, PAYLOAD, Page, build_run, result_of
from token_views import chain_sum_views

from fastsd.evaluation.localisation import Localisation
from fastsd.evaluation.views import FILE, write_views
from fastsd.records.folder import MetricsWriter, RunFolderError, append_evaluation
from fastsd.report import main
from fastsd.reporting.comparison import comparison, labelled, printable, read_runs
from fastsd.reporting.curves import intervals, metrics_of, phases, styles_of
from fastsd.reporting.report import write_report

OTHER = result_of([[1, 0], [0, 1]])


def single_run(folder, condition, base, final):
    folder.mkdir(parents=True)
    (folder / "config.resolved.toml").write_text(f"condition = '{condition}'\n")
    append_evaluation(folder, 0, base)
    append_evaluation(folder, 9, final)
    return folder


def differences(folders):
    return dict(comparison(read_runs(folders))["differences"])


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/run", "b/run", "b/other")]
    for path in paths:
        single_run(path, "grpo", BASE, BETTER)
    assert list(read_runs(paths)) == ["a/run", "b/run", "b/other"]
    assert list(read_runs(paths[1:])) == ["run", "other"]
    assert list(read_runs(paths[:1])) == [""]
    assert labelled("run", "grpo") == "run · grpo" and labelled("", "grpo") == "grpo"
    assert printable("a\x07b\u202e") == "a\ufffdb\ufffd"
    with pytest.raises(RunFolderError, match="a/run is given twice"):
        read_runs([paths[0], tmp_path / "b" / ".." / "a" / "run"])


def test_runs_on_the_same_questions_are_paired(tmp_path):
    build_run(tmp_path / "old")
    build_run(tmp_path / "new", seeds=(0,))
    found = comparison(read_runs([tmp_path / "old", tmp_path / "new"]))
    labels = [row[0] for row in found["rows"]]
    assert labels == ["base", "old · grpo", "old · critique", "new · grpo", "new · critique"]
    pairs = [name for name, _ in found["differences"]]
    assert pairs == [
        "old · grpo − base",
        "old · critique − base",
        "old · critique − old · grpo",
        "new · grpo − base",
        "new · grpo − old · grpo",
        "new · critique − base",
        "new · critique − old · critique",
        "new · critique − new · grpo",
    ]
    assert dict(found["differences"])["new · critique − old · critique"] == "+0.0 (+0.0 to +0.0)"
    assert found["headers"][2] == "Avg@3 %" and "The same 4 held-out questions" in found["basis"]


def test_runs_of_one_condition_each_are_paired_as_a_comparison_would(tmp_path):
    first = single_run(tmp_path / "first", "critique", BASE, BEST)
    second = single_run(tmp_path / "second", "grpo", BASE, BETTER)
    assert "first · critique − second · grpo" in differences([first, second])
    assert "second · grpo − first · critique" not in differences([first, second])


def test_runs_with_other_bases_keep_their_own(tmp_path):
    first = single_run(tmp_path / "first", "critique", BASE, BEST)
    second = single_run(tmp_path / "second", "critique", BETTER, BEST)
    found = comparison(read_runs([first, second]))
    assert [row[0] for row in found["rows"]][::2] == ["first · base", "second · base"]
    assert "second · critique − first · base" not in differences([first, second])


def test_runs_on_other_questions_stand_side_by_side(tmp_path):
    first = single_run(tmp_path / "first", "critique", BASE, BEST)
    second = single_run(tmp_path / "second", "critique", OTHER, OTHER)
    found = comparison(read_runs([first, second]))
    assert "side by side" in found["basis"] and "4 × 3, 2 × 2" in found["basis"]
    assert found["headers"][2] == "Avg@k %"
    assert [row[1] for row in found["rows"]] == ["4 × 3", "4 × 3", "2 × 2", "2 × 2"]
    assert list(differences([first, second])) == [
        "first · critique − first · base",
        "second · critique − second · base",
    ]


def test_a_run_without_evaluations_is_left_out_of_the_comparison_only(tmp_path):
    first = single_run(tmp_path / "first", "critique", BASE, BEST)
    (tmp_path / "second").mkdir()
    with MetricsWriter(tmp_path / "second") as writer:
        writer.write(1, {"reward/mean": 0.5})
    found = comparison(read_runs([first, tmp_path / "second"]))
    assert [row[0] for row in found["rows"]] == ["first · base", "first · critique"]
    text = Page(write_report(first, tmp_path / "second", out=tmp_path / "p.html").read_text()).text
    assert "2 runs" in text


def test_one_page_of_two_runs(tmp_path, monkeypatch, capsys):
    build_run(tmp_path / "old", PAYLOAD)
    build_run(tmp_path / "new", PAYLOAD)
    write_views(tmp_path / "new" / FILE, chain_sum_views())
    monkeypatch.chdir(tmp_path)
    assert main(["old", "new"]) == 0
    assert capsys.readouterr().out.strip() == "report.html"
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "old and new" in page.text and "old · critique-seed0" in page.text
    assert "new · reference" in page.text and page.tags.count("details") == 1
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.text.count("The teacher is a frozen copy") == 1
    assert main(["old", "--out", "one.html"]) == 0 and (tmp_path / "one.html").exists()
    assert not (tmp_path / "old" / "report.html").exists()
    assert main(["old", "--out", "no/such/page.html"]) == 2
    assert "cannot write no/such/page.html: No such file" in capsys.readouterr().err


def test_a_run_with_views_shows_tokens_and_figures(tmp_path):
    build_run(tmp_path)
    write_views(tmp_path / FILE, chain_sum_views())
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("details") == 1 and "✗ first wrong" in page.text
    # pictures let the page's colour through, which may be dark
    assert not re.search(r'fill="(#fff|#ffffff|white)"', html)
    assert any(n == "href" and v == "#tokens" for _, n, v in page.attributes)
    assert page.tags.count("svg") > 6
    # the task's own steps cut the feedback: parse_steps would see one line
    assert page.text.count("step 3") == 2
    (tmp_path / FILE).write_bytes(b"PAR1 no")
    assert main([str(tmp_path)]) == 2


def test_of_several_runs_the_condition_has_the_colour_and_the_run_the_dash():
    styles = styles_of(["a · grpo", "a · critique", "b · critique"])
    assert styles["a · critique"][0] == styles["b · critique"][0] != styles["a · grpo"][0]
    assert styles["a · critique"][1] == styles["a · grpo"][1] != styles["b · critique"][1]
    assert styles_of(["critique"]) == {"critique": ("#1f8fd6", "-")}


def test_phases_and_tokens_are_means_over_updates_and_seeds(tmp_path):
    for seed, seconds in enumerate((1.0, 3.0)):
        child = tmp_path / f"critique-seed{seed}"
        child.mkdir()
        with MetricsWriter(child) as writer:
            for step in (1, 2):
                times = {"time/rollout_s": seconds, "time/student_s": 0.5}
                tokens = {"tokens/student": 100.0, "tokens_saved/student": 50.0 * step}
                writer.write(step, {**times, **tokens})
    found = phases(metrics_of(read_runs([tmp_path])))
    assert found["rows"] == [["critique, student", "100", "75", "1.75 ×"]]
    (svg,) = found["figures"]
    text = re.findall(r"<text[^>]*>([^<]*)", svg)
    assert " 2.5 s" in text and "rollout" in text and "critic" not in text
    assert phases({"critique": [[{"step": 1}]]}) is None
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Time and tokens" in page.text and "1.75 ×" in page.text


def test_the_interval_figure_names_rows_and_means():
    svg = intervals("Avg@3", {"base": (0.1, 0.05, 0.2), "a · critique": (0.5, 0.4, 0.6)})
    text = re.findall(r"<text[^>]*>([^<]*)", svg)
    assert {"base", "a · critique", "10.0", "50.0", "Avg@3 and its 95 % interval"} <= set(text)


def test_localisation_of_several_runs_is_one_table(tmp_path):
    for name in ("old", "new"):
        build_run(tmp_path / name)
    summary = json.loads((tmp_path / "old" / "summary.json").read_text())
    summary["localisation"]["critique"] = Localisation().to_json()
    (tmp_path / "old" / "summary.json").write_text(json.dumps(summary))
    path = write_report(tmp_path / "old", tmp_path / "new", out=tmp_path / "both.html")
    text = Page(path.read_text(encoding="utf-8")).text
    assert "old · critique –" in text
    assert f"new · critique {FOUND.before.mean:.3f}" in text
