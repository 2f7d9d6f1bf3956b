"""The step bench compares equal things: same tokens, same loss, counted work is the work done, and
what fails or disagrees gets no figure."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from bench import bench_train_step
from bench.common import problem
from bench.train_step import fastsd as train_step_fastsd
from bench.train_step import hf as train_step_hf
from bench.train_step import runs as train_step_runs
from bench.train_step.count import CONDITIONS, count, flop, gemm, linear_weights
from bench.train_step.model import save_model, tokenizer
from bench.train_step.names import parse_groups, settings_of
from bench.train_step.problem import (
    CONFIGURATIONS,
    TEACHER_TEMPLATE,
    Lengths,
    feedback,
    question,
    responses,
)
from bench.train_step.report import best_trl, report
from bench.train_step.runs import AGREEMENT, Setup, judge, sharing, steps, summary
from bench.train_step.worker import ContestantFailed, Meter, Worker, allocator_settings
from fastsd_kernels.testing import WorkMeter

TINY = CONFIGURATIONS["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), TINY)


@pytest.fixture(autouse=True)
def backward_unmetered(monkeypatch):
    """Contestants meter the process's backward; the next test starts from torch's own."""
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)


def full_settings(folder: Path, name: str, **changes) -> dict:
    common = {"folder": str(folder), "configuration": TINY.to_json(), "threads": 1}
    return common | settings_of(name) | changes


def fastsd(folder: Path, name: str = "fastsd-fp32", **changes) -> train_step_fastsd.Contestant:
    return train_step_fastsd.Contestant(full_settings(folder, name, **changes))


class Script:
    """A channel with scripted requests that keeps the answers."""

    def __init__(self, *requests: dict):
        self.requests, self.answers = list(requests), []

    def receive(self) -> dict:
        if not self.requests:
            raise SystemExit(0)
        return self.requests.pop(0)

    def send(self, answer: dict) -> None:
        self.answers.append(json.loads(json.dumps(answer)))


class Here:
    """A Group without processes."""

    def __init__(self, setup: Setup, settings: dict[str, dict]):
        self.contestants = {}
        for name, own in settings.items():
            if own["engine"] == "gemm":
                self.contestants[name] = lambda request: gemm(**request)
            else:
                own = full_settings(setup.folder, "fastsd-fp32") | own
                self.contestants[name] = train_step_fastsd.Contestant(own).answer
        self.failed: dict[str, str] = {}
        self.facts = {name: {} for name in settings}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def round(self, **request) -> dict[str, dict]:
        return {name: answer(dict(request)) for name, answer in self.contestants.items()}


# -- what is measured -----------------------------------------------------------------------------


def test_a_word_is_a_token_and_texts_are_functions_of_the_index():
    encode = tokenizer(300)
    for text, tokens in ((question(300, 3, 12), 12), (feedback(300, 3, 20, sample=2), 20)):
        assert len(encode(text)["input_ids"]) == tokens
    both = TEACHER_TEMPLATE.format(question=question(300, 3, 12), feedback=feedback(300, 3, 20))
    assert len(encode(both)["input_ids"]) == 32
    assert question(300, 3, 12) == question(300, 3, 12) != question(300, 4, 12)
    assert question(300, 3, 12, sample=1) != question(300, 3, 12)
    rows = responses(300, 3, Lengths(1, 1, 5, 4))
    assert len(rows) == 4 and {len(row) for row in rows} == {5} and rows[0] != rows[1]
    assert min(map(min, rows)) >= 4, "no special token"


def test_rows_and_pairs_by_hand():
    """A row sees itself and all before it on its path: pairs are the sum of positions + 1."""
    q, f, r, g = 5, 3, 4, 2
    at = Lengths(q, f, r, g)
    student = [*range(q), *(g * list(range(q, q + r - 1)))]
    branches = g * list(range(q + f, q + f + r - 1))
    teachers = {
        ("grpo", True): [],
        ("grpo", False): [],
        ("reference", True): [*range(q, q + f), *branches],
        ("critique", True): [q - 1, *(g * list(range(q, q + f + r - 1)))],
        ("reference", False): g * list(range(q + f + r - 1)),
        ("critique", False): g * list(range(q + f + r - 1)),
    }
    for (condition, shared), teacher in teachers.items():
        work = count(at, condition, shared)
        rows = student if shared else g * list(range(q + r - 1))
        assert work.student == (len(rows), sum(rows) + len(rows)), condition
        assert work.teacher == (len(teacher), sum(teacher) + len(teacher)), (condition, shared)
        assert work.units == 3 * len(rows) + len(teacher)
    with pytest.raises(ValueError, match="condition: expected grpo, .* 'critic'"):
        count(at, "critic")


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_the_trainer_computes_what_is_counted(folder, condition, shared):
    """Rows by the trainer's own count, and products of the linear layers as torch sees them."""
    onednn = torch.ops.mkldnn._linear_pointwise
    own = {onednn: lambda left, right, *args, **options: 2 * left[0] * left[1] * right[0]}
    contestant = fastsd(folder, condition=condition, shared=shared)
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        answer = contestant.step(index=0, sampled=False)
    work = count(TINY.lengths, condition, shared)
    rows = {"student": work.student.tokens, "teacher": work.teacher.tokens}
    assert answer["tokens"] == {role: tokens for role, tokens in rows.items() if tokens}
    seen = counter.get_flop_counts()["Global"]
    kinds = (torch.ops.aten.mm, torch.ops.aten.addmm, onednn)
    products = sum(n for op, n in seen.items() if op in kinds)
    assert products == flop(TINY, TINY.lengths, work)["linear"]


def test_operations_of_attention_and_head(folder):
    """On one row of n tokens, where plain attention computes n^2 pairs: 4 N H operations each
    forward, 8 backward; ours computes the scores a second time. The head's are its bench's."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    n, per_pair = 7, TINY.layers * TINY.heads * TINY.head_dim
    with FlopCounterMode(display=False) as counter:
        out = model.model(input_ids=torch.arange(n)[None] + 4)
    forward = counter.get_flop_counts()["Global"]
    assert forward[torch.ops.aten.mm] == 2 * linear_weights(TINY) * n
    assert forward[torch.ops.aten.bmm] == 4 * per_pair * n * n
    with FlopCounterMode(display=False) as counter:
        out.last_hidden_state.sum().backward()
    assert counter.get_flop_counts()["Global"][torch.ops.aten.bmm] == 8 * per_pair * n * n
    at = TINY.lengths
    work = count(at, "reference")
    pairs = 14 * work.student.pairs + 4 * work.teacher.pairs
    found = flop(TINY, at, work)
    assert found["attention"] == per_pair * pairs
    shape = (at.samples * at.response, TINY.hidden, TINY.vocabulary)
    assert found["head"] == problem.flop("reverse_kl", shape)


def test_the_gemm_is_the_one_that_is_counted():
    with WorkMeter() as meter:
        found = gemm("bf16", 32)
    assert meter.product_flop == 2 * found["flop"] == 2 * 2 * 32**3  # one warms up
    assert found["wall"] > 0


def test_phases_are_exclusive_and_cpu_is_not_wall():
    meter = Meter()
    meter.start()
    with meter.phase("outer"):
        spin_until(time.process_time() + 0.04)
        with meter.phase("inner"):
            time.sleep(0.05)
        assert meter.running == "outer"
        spin_until(time.process_time() + 0.02)
    time.sleep(0.02)
    found = meter.read()
    outer, inner = found["phases"]["outer"], found["phases"]["inner"]
    assert inner[0] < 0.03 and inner[1] >= 0.05
    assert 0.06 <= outer[0] < 0.09, "without the inner phase"
    assert found["cpu"] == pytest.approx(outer[0] + inner[0], abs=0.01)
    assert found["wall"] >= outer[1] + inner[1] + 0.02
    meter.start()
    assert meter.read()["phases"] == {}


def spin_until(moment: float) -> None:
    while time.process_time() < moment:
        pass


def test_phases_of_a_step_add_up(folder):
    contestant = fastsd(folder)
    assert not contestant.session.sampler.stop_ids
    answer = contestant.step(index=0, sampled=True)
    assert set(answer["phases"]) == {
        "rollout", "student", "teacher", "head", "backward", "optimizer"
    }  # fmt: skip
    assert sum(cpu for cpu, _ in answer["phases"].values()) <= answer["cpu"]
    assert all(wall > 0 for _, wall in answer["phases"].values())
    assert answer["responses"] == [TINY.lengths.response] * TINY.lengths.samples
    assert answer["peak_bytes"] > 0


# -- contestants do the same ----------------------------------------------------------------------


def ask_trl(folder: Path, name: str, *requests: dict) -> list[dict]:
    pytest.importorskip("trl", reason="trl is not installed")
    from bench.train_step import trl as train_step_trl

    channel: Any = Script(*requests)
    with pytest.raises(SystemExit):
        train_step_trl.run(full_settings(folder, name), channel)
    return channel.answers[1:]


@pytest.mark.parametrize("name", ["trl-fp32", "trl-fp32-half", "trl-autocast"])
def test_trl_takes_the_same_step(folder, name):
    requests = [{"do": "step", "index": i, "sampled": i > 0} for i in range(2)]
    check, sampled = ask_trl(folder, name, *requests)
    ours = fastsd(folder).step(index=0, sampled=False)
    assert check["digest"] == ours["digest"] != sampled["digest"]
    assert check["responses"] == sampled["responses"] == ours["responses"]
    budget = AGREEMENT[settings_of(name)["precision"]]
    for key in ("loss", "grad_norm"):
        assert check[key] == pytest.approx(ours[key], rel=budget)
    assert set(check["phases"]) == set(ours["phases"])
    assert sum(cpu for cpu, _ in check["phases"].values()) <= check["cpu"]


def test_generate_is_the_same_with_every_cache(folder):
    request, found = {"index": 1, "questions": 2, "tokens": 9}, {}
    rows, length = 2 * TINY.lengths.samples, TINY.lengths.response
    for name in ("hf-fp32", "hf-fp32-static", "hf-fp32-prefilled"):
        contestant = train_step_hf.Contestant(full_settings(folder, name))
        found[name] = captured(contestant.model)
        answer = contestant.answer({"do": "generate", **request})
        assert answer["responses"] == [length] * rows and answer["cpu"] > 0
    [plain] = found["hf-fp32"]
    assert plain.shape == (rows, 9 + length) and len(plain.unique(dim=0)) == rows
    assert all(torch.equal(tokens[0], plain) for tokens in found.values())
    with torch.no_grad():
        logits = contestant.model(plain).logits[:, 8:-1]
    drawn = logits.gather(-1, plain[:, 9:, None])
    assert int((logits > drawn).sum(-1).max()) > 50, "from the whole vocabulary"
    assert fastsd(folder).generate(**request)["responses"] == [length] * rows


def captured(model) -> list[torch.Tensor]:
    found, generate = [], model.generate

    def watched(*args, **kwargs):
        found.append(generate(*args, **kwargs))
        return found[-1]

    model.generate = watched
    return found


def test_who_disagrees_gets_no_figure():
    def row(name: str, **changes) -> dict:
        same = {"loss": 0.5, "grad_norm": 2.0, "digest": "a", "cpu": 1.0, "contestant": name}
        return {**settings_of(name), **same, **changes}

    rows = [
        row("fastsd-fp32"),
        row("trl-fp32", loss=0.5 * (1 + 2e-4)),
        row("trl-autocast", grad_norm=2.01),
        row("trl-bf16", grad_norm=float("nan")),
        row("fastsd-bf16", digest="b"),
        row("fastsd-bf16-critique", loss=0.7, digest="c"),
        row("trl-bf16-half", cpu=0.1),
        row("trl-fp32-topk", loss=0.1),
        {"why_not": "gone"},
    ]
    judge(rows)
    assert ["disagrees" in found for found in rows] == [
        False, True, False, True, True, False, False, False, False
    ]  # fmt: skip
    assert "other tokens than fastsd-fp32" in rows[4]["disagrees"]
    best = best_trl(rows[:-1])
    assert best is not None and best["contestant"] == "trl-autocast"


# -- measurements ---------------------------------------------------------------------------------


def test_summary_is_of_medians_and_the_highest_peak():
    answers = [
        {"cpu": c, "wall": 2 * c, "phases": {"head": [c / 2, c]}, "peak_bytes": int(10 * c)}
        for c in (1.0, 9.0, 2.0)
    ]
    assert summary(answers) == {
        "cpu": 2.0, "wall": 4.0, "cpu_rounds": [1.0, 9.0, 2.0], "phases": {"head": [1.0, 2.0]},
        "peak_bytes": 90,
    }  # fmt: skip


def test_sharing_is_beside_its_tokens(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(train_step_runs, "Group", Here)
    monkeypatch.setattr(train_step_runs, "CONDITIONS", ("grpo", "critique"))
    rows = sharing(Setup(folder, TINY, threads=1, rounds=1), "fp32")
    assert [row["condition"] for row in rows] == ["grpo", "critique"]
    for row in rows:
        wanted = [count(TINY.lengths, row["condition"], s).units for s in (False, True)]
        assert row["counted"] == wanted[0] / wanted[1] > 1
        assert row["share_network"] == row["measured_network"] / row["counted"]
    monkeypatch.setattr(bench_train_step, "measured", lambda args, name: rows)
    out = tmp_path / "sharing.json"
    assert bench_train_step.main(["--tiny", "--sharing", "--json", str(out)]) == 0
    assert "| tiny | critique |" in out.with_suffix(".md").read_text()


def test_scaling_has_a_line_for_every_series(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(train_step_runs, "Group", Here)
    rows = train_step_runs.scaling(Setup(folder, TINY, threads=1, rounds=1), "fp32")
    assert [(row["axis"], row["samples"]) for row in rows] == [
        ("response", 4), ("samples", 0), ("question", 1), ("question", 4), ("question", 16),
    ]  # fmt: skip
    assert rows[0]["x"] == [4, 8, 16, 32] and rows[2]["x"] == [3, 6, 12, 24, 48]
    monkeypatch.setattr(bench_train_step, "measured", lambda args, name: rows)
    out = tmp_path / "scaling.json"
    assert bench_train_step.main(["--tiny", "--scaling", "--json", str(out)]) == 0
    assert "tokens of the question" in out.with_suffix(".svg").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_other_rows_than_counted_have_no_figure(folder, monkeypatch):
    monkeypatch.setattr(train_step_runs, "Group", Here)
    monkeypatch.setattr(
        train_step_runs, "count", lambda at, condition, _: count(at, condition, False)
    )
    setup = Setup(folder, TINY, threads=1, rounds=1, gemm_size=16)
    [row] = steps(setup, [["fastsd-fp32"]])
    assert "computed {'student': 40, 'teacher': 48} tokens, counted" in row["disagrees"]
    assert bench_train_step.failed(row)


def test_who_fails_is_out_and_the_others_go_on(folder, monkeypatch):
    class Stub:
        def __init__(self, settings: dict, log: Path):
            self.name = log.stem

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def loaded(self) -> dict:
            if self.name == "trl-fp32":
                raise ContestantFailed("no such module")
            return {"rest_bytes": 1}

        def ask(self, index: int = 0, **request) -> dict:
            if self.name == "trl-autocast" and index == 1:
                raise ContestantFailed("RuntimeError: index_copy_")
            answer = {"cpu": 1.0, "wall": 1.0, "flop": 1.0, "phases": {"head": [1.0, 1.0]}}
            tokens = {"student": 40, "teacher": 48}
            check = {"loss": 1.0, "grad_norm": 1.0, "digest": "a", "responses": [8] * 4}
            return answer | check | {"tokens": tokens, "peak_bytes": 1}

    monkeypatch.setattr(train_step_runs, "Worker", Stub)
    setup = Setup(folder, TINY, threads=1, rounds=1)
    rows = steps(setup, [["fastsd-fp32", "trl-fp32", "trl-autocast"], ["trl-bf16"]])
    assert [row.get("why_not") for row in rows] == [
        None, "no such module", "RuntimeError: index_copy_", None
    ]  # fmt: skip
    assert all(("cpu" in row) != ("why_not" in row) for row in rows)
    assert not any(map(bench_train_step.failed, rows)), "none of ours"
    assert bench_train_step.failed({"engine": "fastsd", "why_not": "gone"})


def test_a_whole_run(tmp_path, capsys):
    """Processes, turns, record and report."""
    pytest.importorskip("trl", reason="trl is not installed")
    out = tmp_path / "found.json"
    arguments = ["--tiny", "--threads", "1", "--rounds", "1", "--json", str(out)]
    assert bench_train_step.main([*arguments, "--contestants", "fastsd-fp32,trl-fp32"]) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, trl = found["rows"]
    assert ours["digest"] == trl["digest"] and "disagrees" not in ours | trl
    assert ours["gemm_cpu"] > 0 and 0 < ours["share_cpu"] < 1
    text = out.with_suffix(".md").read_text()
    assert text == report(found) and "trl-fp32 over fastsd-fp32, CPU time" in text


def test_a_worker_says_what_went_wrong(tmp_path):
    with Worker({"engine": "gemm", "threads": 1}, tmp_path / "log") as worker:
        worker.loaded()
        assert worker.ask(precision="fp32", size=8)["flop"] == 1024
        with pytest.raises(ContestantFailed, match="KeyError: 'fp8'"):
            worker.ask(precision="fp8", size=8)


def test_all_run_with_the_makefiles_allocator():
    found = allocator_settings()
    assert found["MALLOC_ARENA_MAX"] == "1" and len(found) == 4
    assert all(name.startswith("MALLOC_") and value.isdigit() for name, value in found.items())


# -- arguments ------------------------------------------------------------------------------------


def test_names():
    assert settings_of("trl-autocast-half-topk") == {
        "engine": "trl", "precision": "autocast", "objective": "topk_logits", "cache": None,
        "micro": 2, "checkpointing": False,
    }  # fmt: skip
    assert settings_of("fastsd-bf16-critique")["condition"] == "critique"
    assert settings_of("fastsd-bf16-checkpointed")["checkpointing"]
    assert parse_groups("fastsd-fp32,trl-fp32/trl-bf16", ("fastsd", "trl")) == [
        ["fastsd-fp32", "trl-fp32"], ["trl-bf16"]
    ]  # fmt: skip
    for name, message in (
        ("verl-fp32", "expected one of fastsd"),
        ("trl", "expected one of fp32, autocast"),
        ("fastsd-autocast", "fp32, bf16 second"),
        ("hf-fp32-half", "options of hf are static, prefilled; found 'half'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_of(name)
    with pytest.raises(ValueError, match="expected fastsd or hf here"):
        parse_groups("trl-fp32", ("fastsd", "hf"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--configurations", "llama"], "--configurations: .* got 'llama'"),
        (["--contestants", "trl-fp64"], "--contestants: 'trl-fp64'"),
        (["--sharing", "--contestants", "trl-fp32"], "--contestants: --sharing has its own"),
        (["--tiny", "--configurations", "smollm2"], "--tiny"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--flops", "--sharing"], "not allowed with"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_train_step.parse(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
