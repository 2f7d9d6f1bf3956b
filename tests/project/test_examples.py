"""The examples run as they stand: on tiny models, offline."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from places import ROOT
from tiny_models import build_tiny_llama

from fastsd import conditions
from fastsd.config import load_config, sections, tree

EXAMPLES = ROOT / "examples"


def run(*words: str | Path, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_configurations_load(path):
    load_config([str(path)])


def test_kernels_in_a_loop_of_your_own(tmp_path):
    model = build_tiny_llama(tmp_path / "model")
    script = EXAMPLES / "hand_written_loop.py"
    out = run(script, "--model", model, "--steps", 3, "--lr", 3e-3, folder=tmp_path)
    divergence = [float(value) for value in re.findall(r"KL\(S\|\|T\) (\S+) nats", out)]
    assert len(divergence) == 3
    assert divergence[-1] < divergence[0]  # it moves towards the teacher


def test_kernels_inside_trl(tmp_path):
    model = build_tiny_llama(tmp_path / "model")
    out = run(EXAMPLES / "trl_sdpo.py", "--model", model, "--steps", 2, folder=tmp_path)
    assert "train_loss" in out


def test_the_page_on_conditions_shows_the_code_that_ships():
    page = (EXAMPLES / "new_condition.md").read_text()
    function, template, row = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert function == inspect.getsource(conditions.sibling_solution)
    assert template in inspect.getsource(sections.PromptConfig)
    assert row in inspect.getsource(conditions)
    assert "sibling" in get_args(tree.ConditionName)
