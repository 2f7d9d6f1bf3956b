"""The planner's hardware, its command and its errors."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import pytest
import torch
from tiny_models import build_tiny_llama, build_tiny_qwen3

from fastsd import plan
from fastsd.config.sections import ModelConfig
from fastsd.model.refusals import ModelError
from fastsd.planning.counts import Use, Work, count_step
from fastsd.planning.fleet import serve
from fastsd.planning.hardware import ASSUMED, TABLE, Fleet, PlanError, parse_hardware, table
from fastsd.planning.model import ModelCounts, count_model
from fastsd.planning.rows import Lengths, Step
from fastsd.planning.trace import Product

AT = Lengths(question=24, feedback=18, response=9, samples=4, longest_response=9)
STEP = Step(AT, 2, "group", True, 16384, True, 256)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": build_tiny_llama(root / "llama"),
        "qwen3": build_tiny_qwen3(root / "qwen3"),
    }


@pytest.fixture(scope="module")
def llama(folders) -> ModelCounts:
    return count_model(ModelConfig(name=str(folders["llama"])), torch.float32)


# -- hardware -------------------------------------------------------------------------------------


def test_the_table_is_complete_and_names_its_sources():
    rows = tomllib.loads(TABLE.read_text())
    assert {"H100", "H200", "A100", "L40S", "RTX4090", "B200", "MI300X"} <= set(rows)
    text = TABLE.read_text()
    for name, device in table().items():
        assert device.bf16_tflops > device.fp32_tflops > 0 and device.memory_gib > 8
        assert device.link_gbs >= device.network_gbs > 0 and device.memory_gbs > 500
        before = text[: text.index(f"[{name}]")].rstrip().splitlines()[-3:]
        assert any("data sheet" in line or "white paper" in line for line in before)


def test_hardware_is_read_with_count_and_any_case():
    assert parse_hardware("8xH100").count == 8
    assert parse_hardware("rtx 4090").device.name == "RTX4090"
    assert parse_hardware("16 x mi300x").device.name == "MI300X"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xH10", ["did you mean", "H100", "hardware_table.toml"]),
        ("0xH100", ["at least 1"]),
        ("8", ["COUNTxNAME"]),
        ("", ["COUNTxNAME"]),
        ("8xTPUv9000", ["There are", "H100"]),
        ("H100x8", ["did you mean 8xH100?"]),
    ],
)
def test_unknown_hardware_is_refused_with_what_there_is(text, words):
    with pytest.raises(PlanError) as error:
        parse_hardware(text)
    for word in words:
        assert word in str(error.value)


def test_servers_are_never_this_machine():
    with pytest.raises(PlanError) as error:
        parse_hardware("cpu", "--rollout-hardware")
    assert "--rollout-hardware cpu" in str(error.value) and "and cpu" not in str(error.value)


def test_seconds_follow_the_roofline(llama):
    fleet = parse_hardware("1xH100")
    works = {work.phase: work for work in count_step(llama, STEP)}
    head = works["loss head forward"]
    found = fleet.seconds(head)
    peak = fleet.device.fp32_tflops * 1e12
    assert found.low >= head.flop / (peak * ASSUMED.products[1])
    assert found.low < found.high
    assert fleet.seconds(works["optimizer"]).limit == "bandwidth"
    assert fleet.seconds(works["student forward"]).limit == "calls"  # launches of a tiny model
    slow = replace(works["student forward"], link_bytes=1e15)
    assert fleet.seconds(slow).limit == "link"
    one_row = Work("x", (Use(Product(4096, 4096, 1, 2), 1, 1, 1),))
    least = one_row.bytes / (fleet.device.memory_gbs * 1e9 * ASSUMED.memory[1])
    assert fleet.seconds(one_row).low == pytest.approx(least)
    assert fleet.seconds(one_row).limit == "bandwidth"
    # Across nodes the network carries what NVLink does within.
    near, far = (Fleet(fleet.device, n).seconds(slow).low for n in (8, 16))
    assert far == pytest.approx(9 * near, rel=1e-3)


def test_servers_take_the_devices_that_are_fastest_and_refuse_what_does_not_fit(llama):
    step = replace(STEP, questions=64)
    served = serve(llama, step, parse_hardware("16xA100"), "rollout", synced=True)
    assert served.servers * served.devices <= 16 and served.low > 0
    assert served.sync_bytes == 4 * llama.parameters
    huge = replace(llama, weight_bytes=10**13)
    with pytest.raises(PlanError, match="--rollout-hardware 16xA100"):
        serve(huge, step, parse_hardware("16xA100"), "rollout", synced=True)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture()
def command(folders, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    settings = {
        "model.name": folders["qwen3"], "data.train": rows, "data.eval": rows,
        "rollout.max_new_tokens": 32, "rollout.samples_per_prompt": 4, "condition": "reference",
        "model.dtype": "float32",
    }  # fmt: skip

    def run(*words: str, **changes) -> tuple[int, str, str]:
        asked = settings | {name.replace("__", "."): value for name, value in changes.items()}
        flags = [str(word) for name, value in asked.items() for word in (f"--{name}", value)]
        status = plan.main([*flags, *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_command_prints_a_plan_and_json_of_it(command):
    status, out, _ = command("--hardware", "2xH100", "--question", "64", "--feedback", "40")
    assert status == 0
    for words in ("student backward", "largest optim.micro_batch_tokens", "predicted, not measured",
                  "2 ranks", "loss head gathered", "peak", "unshared", "link MB",
                  "without shared prefixes"):  # fmt: skip
        assert words in out
    status, out, _ = command("--hardware", "2xH100", "--question", "64", "--json")
    [found] = json.loads(out)["plans"]
    assert found["loss_head"]["layout"] == "gathered"
    assert found["ranks"] == 2 and found["questions_a_rank"] == 2
    low, high = found["step_seconds"]
    assert 0 < low < high
    assert {p["phase"] for p in found["phases"]} >= {"rollout decode", "optimizer"}
    assert found["lengths"]["response"] == 32


def test_conditions_and_loras_differ(command):
    critic = {"critic__kind": "replay", "critic__file": "critiques.jsonl"}
    _, out, _ = command("--hardware", "1xL40S", "--json", condition="all", **critic)
    plans = json.loads(out)["plans"]
    assert [p["condition"] for p in plans] == ["grpo", "reference", "critique"]
    flop = {p["condition"]: sum(w["flop"] for w in p["phases"]) for p in plans}
    assert flop["grpo"] < flop["reference"] < flop["critique"]


def test_servers_and_their_critic_are_planned_apart(command, folders):
    servers = {"rollout__engine": "vllm", "rollout__servers": "http://127.0.0.1:1",
               "condition": "critique", "critic__kind": "server",
               "critic__url": "http://127.0.0.1:2", "critic__model": folders["llama"]}  # fmt: skip
    fleets = ["--rollout-hardware", "4xH100", "--critic-hardware", "2xA100"]
    _, out, _ = command("--hardware", "4xH100", *fleets, "--json", **servers)
    [found] = json.loads(out)["plans"]
    assert [s["role"] for s in found["servers"]] == ["rollout", "critic"]
    assert not any(p["phase"].startswith("rollout") for p in found["phases"])
    assert found["servers"][0]["sync_bytes"] and not found["servers"][1]["sync_bytes"]
    _, out, _ = command("--hardware", "4xH100", **servers)
    assert "--rollout-hardware" in out and "--critic-hardware" in out


def test_a_model_that_does_not_fit_says_by_how_much_and_what_to_change(command, monkeypatch):
    small = replace(table()["RTX4090"], memory_gib=3.0)
    monkeypatch.setattr("fastsd.planning.hardware.table", lambda: {"small": small})
    status, out, err = command("--hardware", "4xsmall", rollout__prompts_per_step=2048,
                               optim__micro_batch_tokens=10**9)  # fmt: skip
    assert status == 2
    assert "does not fit" in err and "too few" in err and "--optim.micro-batch-tokens" in err
    assert "DOES NOT FIT" in out


SPLIT = {"parallel__head": "sharded", "loss__impl": "chunked"}


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["--hardware", "8xH100"], {}, "rollout.prompts_per_step = 4"),
        (["--hardware", "1xH100", "--response", "64"], {}, "rollout.max_new_tokens = 32"),
        (["--hardware", "1xH100", "--question", "0"], {}, "--question 0"),
        (["--hardware", "1xH100", "--question", "40000", "--feedback", "30000"], {}, "positions"),
        (["--hardware", "1xH100"], {"model__name": "/nowhere/at/all"}, "cannot be read"),
        (["--hardware", "1xH100"], {"optim__lr": "-1"}, "optim.lr"),
        (["--hardware", "1xH100", "--rollout-hardware", "1xH100"], {}, 'rollout.engine = "inpro'),
        (["--hardware", "1xH100", "--critic-hardware", "1xH100"], {}, "has no critic"),
        (["--hardware", "1xH100", "--critique", "9"], {}, "has no critic"),
        (["--hardware", "1xH100", "--critique", "9"], {"condition": "all"}, 'critic.kind = "rule"'),
        (["--hardware", "1xH100", "--feedback", "9"], {"condition": "grpo"}, "shows none"),
        (["--hardware", "1xH100", "--nonsense", "9"], {}, "unknown key"),
        (["--hardware", "2xH100"], SPLIT, "leave parallel.head"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(command, words, changes, said):
    status, _, err = command(*words, **changes)
    assert status == 2 and said in err and "Traceback" not in err


GEMMA = '{"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "not a valid JSON"),
        ('{"model_type": "clip"}', "configuration"),
        ('{"model_type": "mamba"}', "decoder-only"),
        (GEMMA, "softcapping"),
    ],
)
def test_a_configuration_that_cannot_be_planned_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        count_model(ModelConfig(name=str(tmp_path)), torch.float32)


def test_this_machine_is_measured_in_a_few_seconds(command):
    torch.set_num_threads(1)
    status, out, _ = command("--hardware", "cpu", "--question", "32", "--feedback", "16", "--json")
    [found] = json.loads(out)["plans"]
    assert status == 0
    seconds = {p["phase"]: p["seconds"] for p in found["phases"]}
    assert all(0 <= low <= high for low, high in seconds.values())
    assert seconds["rollout decode"][1] > seconds["rollout prefill"][0] > 0
    assert found["hardware"].startswith("cpu")
