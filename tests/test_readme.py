"""What the README shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastsd.cli import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code):
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_blocks_load(text, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(text)
    assert load_config([str(path)]).config.condition == "reference"


def test_there_is_something_to_check_and_every_named_target_exists():
    assert blocks("python") and blocks("toml")
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    )
    named = set(re.findall(r"make ([a-z0-9-]+)", README))
    assert named and named <= targets
    for file in re.findall(r"`((?:examples|kernels)/[\w./]+)`", README):
        assert (ROOT / file).exists(), file
