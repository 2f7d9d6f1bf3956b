"""--dry-run of the paper's recipe with a tiny random Qwen3 that has the real chat template, and of
two ranks."""

import json
import re
from pathlib import Path

import dry_run_worker
import pytest
from dry_run_worker import CASES
from places import ROOT
from ranks import run_ranks
from tiny_models import build_tiny_qwen3

from fastsd.train import main

RECIPE = ROOT / "examples" / "paper_qwen3_1.7b.toml"


def rows(path: Path, count: int) -> str:
    lines = [
        {"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"{i} + {i} = {2 * i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("condition", ["reference", "grpo", "critique", "sibling"])
def test_the_papers_recipe_passes(condition, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_tiny_qwen3(tmp_path / "qwen3")
    critiques = tmp_path / "critiques.jsonl"
    critiques.write_text(json.dumps({"question": "q", "response": "r", "critique": "c"}) + "\n")
    code = main(
        [
            *(str(RECIPE), "--dry-run", "--condition", condition, "--model.name", str(model)),
            *("--critic.kind", "replay", "--critic.file", str(critiques)),
            *("--data.train", rows(tmp_path / "train.jsonl", 40)),
            *("--data.eval", rows(tmp_path / "eval.jsonl", 8)),
        ]
    )
    output = capsys.readouterr().out
    assert code == 0, output
    # The head is bf16 or fp32 as the processor has it; either runs natively where there is g++.
    assert re.search(r"loss_head: (native \(the fastest on cpu|chunked \(native is not)", output)
    assert "attention: native, packed token trees" in output
    assert "response 2048 tokens" in output and "optimizer moments" in output
    if condition != "grpo":
        shared, _, rest = output.partition("student goes on:")
        student, _, teacher = rest.partition("teacher goes on:")
        assert "What is" in shared and "<think>\n\n</think>" in student
        assert (
            "Here is a worked solution" in teacher
            and "</think>" not in teacher.split("longest row")[0]
        )
    if condition in ("critique", "sibling"):  # feedback as long as the response stands in
        assert int(re.search(r"with feedback (\d+),", output)[1]) > 2048
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"qwen3", "train.jsonl", "eval.jsonl", "critiques.jsonl"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(dry_run_worker.main, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_runs_the_longest_row(ranks, case):
    told = [rank[case] for rank in ranks]
    assert [rank["tokens"] for rank in told] == [24, 24]
    assert [rank["batches"] for rank in told] == [1, 1]
    assert "one update on every rank in" in told[0]["text"]


def test_the_report_of_many_ranks_says_how_weights_lie_and_what_each_holds(ranks):
    def mebibytes(case: str, part: str) -> float:
        line = re.search(rf"memory, {part}: (\S+) MiB on each of 2 ranks", ranks[0][case]["text"])
        return float(line[1])

    for case in CASES:
        assert "weights: FSDP2 over 2 ranks" in ranks[0][case]["text"]
        whole = mebibytes(case, "all weights, while responses are sampled")
        assert mebibytes(case, "weights") == pytest.approx(whole / 2, abs=0.1)
    assert mebibytes("critique", "teacher's average") == mebibytes("critique", "weights")
    assert mebibytes("lora", "gradients") < mebibytes("critique", "gradients") / 4
