"""What ships and how it imports: the traps of two source roots, one of them called `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from places import ROOT

TOP_LEVEL = (
    "pyproject.toml README.md DESIGN.md LOG.md CONTRIBUTING.md LICENSE Makefile setup.py "
    "MANIFEST.in constraints.txt .ci/run csrc kernels fastsd bench examples tests"
)


def run(*command: object, cwd: Path = ROOT, path: str = "", **variables: str) -> str:
    """Standard output of a command with PYTHONPATH = `path`; fails with its error text."""
    environment = os.environ | {"PYTHONPATH": path} | variables
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_kernels_is_a_source_root_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "fastsd_kernels" / "__init__.py").exists()


def test_the_top_level_is_complete():
    assert [name for name in TOP_LEVEL.split() if not (ROOT / name).exists()] == []


def test_transformers_is_not_fooled_by_the_kernels_folder():
    """Seen from the root, `import kernels` finds the bare folder: it must never run a file of ours
    nor pass for Hugging Face's package of that name."""
    program = (
        "import sys, transformers\n"
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "found = sys.modules.get('kernels')\n"
        "print(is_kernels_available(), getattr(found, '__file__', None))"
    )
    assert run(sys.executable, "-c", program).split() == ["False", "None"]


def test_importing_the_kernels_loads_neither_triton_nor_transformers():
    program = (
        "import sys, fastsd_kernels\n"
        "print('torch' in sys.modules)\n"
        "fastsd_kernels.fused_linear_loss\n"
        "print(*sorted({'triton', 'transformers', 'fastsd'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", program, path=str(ROOT / "kernels")).split() == ["False"]


def test_every_dependency_has_a_lower_bound_and_the_constraints_fit():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    required = [Requirement(line) for group in groups for line in group]
    assert [r.name for r in required if not any(s.operator == ">=" for s in r.specifier)] == []
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        (version,) = (s.version for s in pin.specifier)
        assert all(version in r.specifier for r in required if r.name == pin.name), pin
    assert "torch" in {pin.name for pin in pins}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository, where what one build has compiled serves the next."""
    copy = tmp_path_factory.mktemp("tree") / "fastsd"
    copy_tree(ROOT, copy)
    return copy


@pytest.fixture(scope="module")
def distributions(tmp_path_factory, tree) -> Path:
    """A wheel and a source archive, built with the setuptools that is installed here."""
    folder = tmp_path_factory.mktemp("dist")
    program = (
        "import setuptools.build_meta as backend, sys\n"
        "folder = sys.argv[1]\n"
        "backend.build_sdist(folder), backend.build_wheel(folder)"
    )
    run(sys.executable, "-c", program, folder, cwd=tree)
    return folder


def copy_tree(source: Path, target: Path) -> None:
    """The repository without environments, runs and caches: building writes beside the sources."""
    skipped = (".git", ".venv*", "build", "*.egg-info", "__pycache__", ".*_cache")
    anywhere, at_root = shutil.ignore_patterns(*skipped), shutil.ignore_patterns("runs", "models")

    def ignored(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | (
            at_root(folder, names) if folder == str(source) else set()
        )

    shutil.copytree(source, target, ignore=ignored)


def test_the_wheel_holds_both_packages_and_their_data(distributions):
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    shipped = {name.split("/")[0] for name in names}
    assert {name for name in shipped if not name.endswith(".dist-info")} == {
        "fastsd",
        "fastsd_kernels",
    }
    expected = {
        str(path.relative_to(root))
        for root in (ROOT, ROOT / "kernels")
        for package in ("fastsd", "fastsd_kernels")
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - names == set()
    assert "fastsd/tasks/chain_sum.toml" in names
    assert any(name.startswith("fastsd/tasks/chain_sum_base/") for name in names)


def test_the_source_archive_can_build_and_test_itself(distributions):
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"csrc/README.md", "bench/README.md", "constraints.txt", "Makefile", "LICENSE"}
    assert expected | {"tests/conftest.py", "kernels/fastsd_kernels/__init__.py"} <= names


def test_an_unpacked_wheel_runs_from_the_root_and_from_elsewhere(distributions, tmp_path):
    wheel = next(distributions.glob("*.whl"))
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    command = (sys.executable, "-m", "fastsd.train", "--help")
    assert "--optim.lr" in run(*command, cwd=ROOT, path=str(target))
    assert "--optim.lr" in run(*command, cwd=tmp_path, path=str(target))
    where = "import fastsd, fastsd_kernels; print(fastsd.__file__, fastsd_kernels.__file__)"
    files = run(sys.executable, "-P", "-c", where, cwd=tmp_path, path=str(target)).split()
    assert all(file.startswith(str(target)) for file in files)


@pytest.mark.parametrize("editable", [True, False])
def test_both_kinds_of_install_run_from_the_root_and_from_elsewhere(
    distributions, tree, tmp_path, editable
):
    """A fresh environment that sees this one's packages; only fastsd is installed in it. The tree
    is the one that the distributions were built in, so its library is not compiled once more; an
    editable install, which would, goes on without a compiler."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    outer = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(site) / "outer.pth").write_text(outer)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--ignore-installed"]
    source = ["--editable", tree] if editable else [tree]
    compilers = {"CC": "false", "CXX": "false"} if editable else {}
    run(python, "-m", "pip", "install", *options, *source, **compilers)
    where = "import fastsd_kernels, fastsd; print(fastsd.__file__, fastsd_kernels.__file__)"
    files = run(python, "-P", "-c", where, cwd=tmp_path).split()
    home = str(tree) if editable else site
    assert all(file.startswith(home) for file in files), files
    for folder in (tree, tmp_path):
        assert "--optim.lr" in run(python, "-m", "fastsd.train", "--help", cwd=folder)
    assert "--optim.lr" in run(tmp_path / "venv" / "bin" / "fastsd-train", "--help", cwd=tmp_path)
