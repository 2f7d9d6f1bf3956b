"""The launchers, each executed with --dry-run on CPUs; Slurm and SkyPilot are stood in for.

A stand-in `srun` starts what it is given once for each node with the variables that Slurm sets; the
`run:` text of the SkyPilot task is run by bash once for each node, as SkyPilot does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torchrun import ENVIRONMENT, ROOT

EXAMPLES = ROOT / "examples"
# The recipe with the embedded task and model in the place of what must be downloaded.
RECIPE = [
    *("--model.name", "chain_sum", "--model.dtype", "float32", "--data.task", "chain_sum"),
    *("--data.train", "none", "--data.eval", "none", "--prompt.system", "none"),
    *("--prompt.max-prompt-tokens", "512"),
    *("--critic.kind", "rule", "--reward.function", "task", "--rollout.max-new-tokens", "24"),
    *("--prompt.critique-template", "{question}H{feedback}", "--eval.questions", "4"),
    *("--model.gradient-checkpointing", "false"),
]
SRUN = """#!/usr/bin/env bash
echo "srun $*" >&2
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & pids[node]=$!; done
echo "${pids[@]}" > "$STAND_IN/pids"
status=0
for node in 0 1; do wait "${pids[node]}" || status=$?; done
exit "$status"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >> "$STAND_IN/calls"
kill -TERM $(cat "$STAND_IN/pids")
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$STAND_IN/calls"
if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; fi
"""


# Below those that a system gives away by itself; another process of these tests has others.
PORTS = iter(range(20_000 + 100 * (os.getpid() % 100), 30_000))


def free_port() -> int:
    """One that nobody takes until the launcher does."""
    for port in PORTS:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def environment(**more: object) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**ENVIRONMENT, "PATH": path, **{name: str(value) for name, value in more.items()}}


@pytest.fixture
def launch():
    """Starts a command; what is left of it when the test fails is ended, its ranks by torchrun."""
    started: list[subprocess.Popen] = []

    def start(*command: object, folder: Path, env: dict[str, str]) -> subprocess.Popen:
        words = [str(word) for word in command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(
            subprocess.Popen(words, cwd=folder, env=env, start_new_session=True, **pipes)
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=60)


def output_of(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def assert_one_report(output: str, ranks: int = 2) -> None:
    assert output.count("# resolved configuration:") == 1, output
    assert output.count("dry run: nothing was trained or written") == 1
    assert f"weights: FSDP2 over {ranks} ranks" in output
    assert re.search(r"one update on every rank in \d", output)
    assert re.search(rf"memory, weights: \S+ MiB on each of {ranks} ranks", output)
    assert "all weights, while responses are sampled" in output


def test_torchrun_on_one_machine(tmp_path, launch):
    command = (EXAMPLES / "torchrun.sh", EXAMPLES / "many_gpus.toml", "--dry-run", *RECIPE)
    output = output_of(launch(*command, folder=tmp_path, env=environment(NPROC=2)))
    assert_one_report(output)
    assert "# condition critique" in output and "critic: rule" in output
    assert not list(tmp_path.iterdir())


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job's first node, with stand-ins for Slurm's commands."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": 2}
    env = environment(**job, STAND_IN=tools, PORT=free_port(), NPROC=1)
    return env | {"PATH": f"{tools}{os.pathsep}{env['PATH']}"}


def test_slurm_on_two_machines(tmp_path, slurm, launch):
    folder = tmp_path / "work"
    folder.mkdir()
    command = ("bash", EXAMPLES / "slurm.sbatch", EXAMPLES / "many_gpus.toml", "--dry-run")
    output = output_of(launch(*command, *RECIPE, folder=folder, env=slurm))
    assert_one_report(output)
    assert 'run = "runs/slurm-7"' in output and 'resume = "auto"' in output
    assert "--kill-on-bad-exit=1" in output and not list(folder.iterdir())
    assert "requeue" not in (tmp_path / "tools" / "calls").read_text()


def test_slurms_taken_port_ends_at_once(tmp_path, slurm, launch):
    with socket.create_server(("", int(slurm["PORT"]))):
        command = ("bash", EXAMPLES / "slurm.sbatch", "--dry-run")
        output = output_of(launch(*command, folder=tmp_path, env=slurm), code=2)
    assert f"port {slurm['PORT']} of localhost is taken" in output and "srun" not in output


@pytest.mark.slow
def test_slurms_notice_saves_a_checkpoint_and_queues_the_job_again(tmp_path, slurm, launch):
    flags = ("--seeds", "1", "--condition", "reference", "--optim.steps", "1500")
    flags += ("--eval.questions", "2", "--eval.samples", "2", "--report.questions", "0")
    flags += ("--checkpoint.every", "0", "--guard.collapse", "off")
    process = launch("bash", EXAMPLES / "slurm.sbatch", *flags, folder=tmp_path, env=slurm)
    run_dir = tmp_path / "runs" / "slurm-7" / "reference-seed0"
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)  # to the batch script alone, as --signal=B: does
    output_of(process, code=1)
    calls = (tmp_path / "tools" / "calls").read_text().splitlines()
    assert calls[-2:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]
    assert len(list(run_dir.glob("checkpoint-*/MANIFEST.json"))) == 1


def sky_task() -> dict:
    return yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())


def test_the_sky_task_has_skypilots_fields():
    task = sky_task()
    fields = {"name", "num_nodes", "workdir", "resources", "volumes", "envs", "setup", "run"}
    assert set(task) == fields and task["num_nodes"] == 2
    assert set(task["resources"]) == {"accelerators", "job_recovery"}
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"])
    assert all(isinstance(value, str) for value in task["envs"].values())
    [volume] = task["volumes"]
    assert (
        task["envs"]["RUN"].startswith(volume) and f"--data.train {volume}/" in task["envs"]["ARGS"]
    )
    assert "constraints.txt" in task["setup"] and (ROOT / "constraints.txt").exists()


def test_skypilot_on_two_machines(tmp_path, launch):
    task, port = sky_task(), free_port()
    given = {"ARGS": " ".join([str(EXAMPLES / "many_gpus.toml"), "--dry-run", *RECIPE])}
    given |= {"RUN": str(tmp_path / "run"), "PORT": port, "SKYPILOT_NUM_NODES": 2}
    given |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_GPUS_PER_NODE": 0}
    nodes = []
    for rank in range(2):
        folder = tmp_path / f"node-{rank}"
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").touch()
        env = environment(**given, SKYPILOT_NODE_RANK=rank)
        nodes.append(launch("bash", "-c", task["run"], folder=folder, env=env))
    first, second = (output_of(node) for node in nodes)
    assert_one_report(first)
    assert "resolved configuration" not in second
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_told_once_and_what_the_launcher_says_of_it(tmp_path, launch):
    command = (EXAMPLES / "torchrun.sh", "--dry-run", "--optim.lr", "fast")
    output = output_of(launch(*command, folder=tmp_path, env=environment(NPROC=2)), code=1)
    assert output.count("error: ") == 1 and "error: --optim.lr" in output
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", output)


def test_help_is_told_once(tmp_path, launch):
    command = (EXAMPLES / "torchrun.sh", "--help")
    output = output_of(launch(*command, folder=tmp_path, env=environment(NPROC=2)))
    assert output.count("usage: python -m fastsd.train") == 1


def test_a_taken_port_is_told_by_torchrun_and_never_a_run(tmp_path, launch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ("torchrun", "--master-addr", "127.0.0.1", "--master-port", port)
        command += ("--nproc-per-node", 1, "-m", "--", "fastsd.train", "--dry-run")
        output = output_of(launch(*command, folder=tmp_path, env=environment()), code=1)
    assert "EADDRINUSE" in output and f"port: {port}" in output
    assert "resolved configuration" not in output


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_the_scripts_are_sound(name):
    script = EXAMPLES / name
    assert os.access(script, os.X_OK)
    checkers = [["bash", "-n"]]
    if shutil.which("shellcheck"):
        checkers.append(["shellcheck"])
    for checker in checkers:
        done = subprocess.run([*checker, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
