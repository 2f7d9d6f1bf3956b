"""What the README shows works as it stands there."""

import re
import subprocess
import sys

import pytest
from places import ROOT

from fastsd.config import load_config

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code):
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_toml_blocks_load(tmp_path):
    files = []
    for text in blocks("toml"):
        name = re.match(r"# (\w+\.toml)", text)
        assert name is not None
        (tmp_path / name[1]).write_text(text)
        files.append(str(tmp_path / name[1]))
    assert load_config(files[:1]).config.condition == "reference"
    both = load_config(files).config
    assert (both.condition, both.critic.kind) == ("critique", "server")


def test_there_is_something_to_check_and_every_named_target_exists():
    assert blocks("python") and blocks("toml")
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    )
    named = set(re.findall(r"make ([a-z0-9-]+)", README))
    assert named and named <= targets
    for file in re.findall(r"`((?:examples|kernels)/[\w./]+)`", README):
        assert (ROOT / file).exists(), file
