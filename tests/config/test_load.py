"""Flags, the embedded preset, the help text, and how a program ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import ROOT

from fastsd.config import Config, ConfigError, load_config
from fastsd.config.flags import help_text
from fastsd.config.schema import leaves
from fastsd.errors import CheckpointError, CriticUnavailable, FastsdError, TrainingDiverged
from fastsd.runtime.program import run_main

BASE = ["--model.name", "m", "--data.task", "chain_sum"]


def config(*flags: str) -> Config:
    return load_config([*BASE, *flags]).config


def test_without_arguments_the_embedded_experiment_is_the_base():
    invocation = load_config(["--optim.steps", "3", "--dry-run"])
    assert invocation.preset and invocation.dry_run
    assert invocation.config.model.name == invocation.config.data.task == "chain_sum"
    assert invocation.config.condition == "all"
    assert invocation.config.optim.steps == 3
    assert invocation.sources == ("the embedded experiment", "--optim.steps 3")


@pytest.mark.parametrize("flags", [["--model.name", "m"], ["--data.task", "chain_sum"]])
def test_naming_a_model_or_data_leaves_the_preset(flags):
    with pytest.raises(ConfigError, match="not set"):
        load_config(flags)


def test_a_model_and_a_task_need_no_file():
    invocation = load_config(BASE)
    assert not invocation.preset and not invocation.dry_run
    expected = {"model": {"name": "m"}, "data": {"task": "chain_sum"}}
    assert invocation.config == Config.model_validate(expected)


def test_dashes_and_underscores_are_the_same():
    flags = ["--rollout.samples-per-prompt", "4", "--rollout.max_new_tokens=9"]
    rollout = config(*flags).rollout
    assert (rollout.samples_per_prompt, rollout.max_new_tokens) == (4, 9)


def test_lists_end_at_the_next_flag():
    made = config("--rollout.stop", "a", "b c", "--optim.betas", "-0.0", "0.5", "--seed", "-3")
    assert made.rollout.stop == ["a", "b c"]
    assert made.optim.betas == (0.0, 0.5)
    assert made.seed == -3
    assert config("--model.freeze", "--seed", "1").model.freeze == []
    assert config("--rollout.stop=a").rollout.stop == ["a"]


def test_a_flag_creates_its_optional_section_and_none_unsets_it():
    lora = config("--model.lora.r", "8").model.lora
    assert lora is not None and (lora.r, lora.alpha) == (8, 128)
    assert config("--model.lora.r", "8", "--model.lora", "none").model.lora is None
    assert config("--loss.clip", "none", "--loss.top-k", "3").loss.clip is None


def test_booleans_take_a_word_or_stand_alone():
    assert config("--data.shuffle", "False").data.shuffle is False
    assert config("--data.shuffle=true").data.shuffle is True
    assert config("--model.gradient-checkpointing", "--seed", "1").model.gradient_checkpointing


def test_free_tables_take_any_key():
    made = config(
        "--prompt.student-template-kwargs.enable-thinking", "false",
        "--prompt.student-template-kwargs.mood", "calm",
        "--data.task-options.depth", "3",
        "--per-condition.grpo.optim.lr", "1e-3",
        "--per-condition.grpo.rollout.samples-per-prompt", "16",
    )  # fmt: skip
    assert made.prompt.student_template_kwargs == {"enable_thinking": False, "mood": "calm"}
    assert made.data.task_options == {"depth": 3}
    overrides = {"optim": {"lr": 1e-3}, "rollout": {"samples_per_prompt": 16}}
    assert made.per_condition == {"grpo": overrides}


def test_the_last_of_two_equal_flags_wins():
    assert config("--seed", "1", "--seed", "2").seed == 2


def test_words_that_only_look_like_numbers_stay_text():
    assert config("--run", "007").run == "007"
    assert (
        load_config(["--model.name", "123", "--data.task", "chain_sum"]).config.model.name == "123"
    )


def test_single_dash_flags_are_unknown():
    with pytest.raises(ConfigError, match="^-x: unknown flag"):
        load_config(["-x"])


def test_help_names_every_setting_with_its_meaning():
    text = " ".join(help_text().split())
    for path, setting in leaves(Config):
        flag = "--" + ".".join(map(str, path)).replace("_", "-")
        assert f" {flag}" in text
        assert setting.description, f"{flag} has no docstring"
        assert " ".join(setting.description.split()) in text
    assert max(map(len, help_text().splitlines())) <= 110


def test_help_of_the_trainer_loads_neither_torch_nor_transformers():
    program = (
        "import json, runpy, sys\n"
        "sys.argv = ['fastsd.train', '--help']\n"
        "try:\n    runpy.run_module('fastsd.train', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print()\nprint(json.dumps(sorted(sys.modules)))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--optim.lr FLOAT  [5e-06]" in done.stdout
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "fastsd.config" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "triton", "matplotlib"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(FastsdError, 2), (CriticUnavailable, 3), (TrainingDiverged, 4), (CheckpointError, 5)],
)
def test_errors_for_the_user_become_a_message_and_an_exit_code(capsys, error, code):
    def main():
        raise error("what to do")

    assert run_main(main) == code
    assert capsys.readouterr().err == "error: what to do\n"


def test_config_errors_end_with_2_and_interrupts_with_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run_main(lambda: load_config(["no.toml"]) and None) == 2
    assert "no.toml" in capsys.readouterr().err
    assert run_main(interrupted) == 130
    assert run_main(lambda: None) == 0
    assert run_main(lambda: 7) == 7


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)
