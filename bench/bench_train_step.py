"""One optimizer step, generation included, against TRL's SDPO; where its time goes and why.

    python -m bench.bench_train_step                    # whole steps, three configurations
    python -m bench.bench_train_step --flops            # ours alone: shares, distance to the GEMMs
    python -m bench.bench_train_step --generation       # rollouts against Hugging Face generate
    python -m bench.bench_train_step --sharing          # training half with and without sharing
    python -m bench.bench_train_step --scaling --json bench/results/train_step_scaling.json
    python -m bench.bench_train_step --tiny             # its logic, in seconds

Same random weights, questions, lengths and number of tokens; reverse KL over the full vocabulary,
live teacher, one feedback text a question, which is what TRL can do; `critique` has one for each
response. Each contestant is a process; within a group of --contestants all are alive and take turns
step by step. Before any time they take a step on the same scripted responses, whose loss and
gradient norm must agree. Memory is the peak over the resting process.

--json writes the record, a Markdown report beside it and, with --scaling, the plot. The last line
is one JSON object. Exit status 1 if one of ours failed or anybody disagreed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.common import measure
from bench.train_step.model import save_model
from bench.train_step.names import FLOPS, GENERATION, STEPS, STEPS_ELSE, parse_groups
from bench.train_step.plot import plot
from bench.train_step.problem import CONFIGURATIONS
from bench.train_step.report import report
from bench.train_step.runs import Row, Setup, generation, scaling, sharing, steps
from bench.train_step.worker import allocator_settings

SCRIPT = "bench/bench_train_step.py"
TINY_GEMM = 256
MODES = ("steps", "flops", "generation", "sharing", "scaling")
DEFAULT_CONFIGURATIONS = {
    "steps": "llama14m,smollm2,prompt_heavy",
    "flops": "smollm2",
    "generation": "smollm2",
    "sharing": "llama14m,smollm2,prompt_heavy",
    "scaling": "smollm2",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--configurations", help=f"of {', '.join(CONFIGURATIONS)}")
    p.add_argument("--contestants", help="a,b/c,d: groups that are alive together (see names.py)")
    p.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                   help="of --sharing and --scaling")  # fmt: skip
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--json", type=Path)
    p.add_argument("--tiny", action="store_true", help="the tiny configuration: no figures")
    mode = p.add_mutually_exclusive_group()
    for name in MODES[1:]:
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    p.set_defaults(mode="steps")
    return p


def parse(arguments: list[str]) -> argparse.Namespace:
    """The arguments; ends with a message where a name is unknown or a number too small."""
    p = parser()
    args = p.parse_args(arguments)
    if args.tiny and args.configurations:
        p.error("--tiny: it is a configuration; drop it or --configurations")
    names = "tiny" if args.tiny else args.configurations or DEFAULT_CONFIGURATIONS[args.mode]
    args.configurations = names.split(",")
    for name in args.configurations:
        if name not in CONFIGURATIONS:
            p.error(f"--configurations: expected some of {', '.join(CONFIGURATIONS)}, got {name!r}")
    if args.contestants and args.mode in ("sharing", "scaling"):
        p.error(f"--contestants: --{args.mode} has its own; choose --precision")
    for option in ("rounds", "threads"):
        if getattr(args, option) < 1:
            p.error(f"--{option}: expected at least 1, got {getattr(args, option)}")
    try:
        engines = ("fastsd", "hf") if args.mode == "generation" else ("fastsd", "trl")
        args.groups = {
            name: parse_groups(args.contestants or contestants(args.mode, name), engines)
            for name in args.configurations
        }
    except ValueError as error:
        p.error(f"--contestants: {error}")
    return args


def contestants(mode: str, configuration: str) -> str:
    """Who takes part where --contestants does not say."""
    if mode == "generation":
        return GENERATION
    return FLOPS if mode == "flops" else STEPS.get(configuration, STEPS_ELSE)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    rows = [row for name in args.configurations for row in measured(args, name)]
    facts = {
        "mode": args.mode,
        "threads": args.threads,
        "rounds": args.rounds,
        "precision": args.precision,
        "configuration": ",".join(args.configurations),
        "allocator": allocator_settings(),
        "notes": notes(args),
    }
    found = measure.record(SCRIPT, torch.device("cpu"), rows, arguments, **facts)
    text = report(found)
    print(text, flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.with_suffix(".md").write_text(text)
        if args.mode == "scaling":
            plot(found, args.json.with_suffix(""))
    measure.write(found, args.json)
    return int(any(failed(row) for row in rows))


def notes(args: argparse.Namespace) -> list[str]:
    """What a reader must know of the figures."""
    clock = "Seconds are medians of process CPU time; a phase's do not contain another's"
    memory = "peak MiB: above the resting process"
    found = [f"{clock}; {memory}"]
    if args.tiny:
        found.append("A tiny model: these figures exercise the script and say nothing else")
    return found


def measured(args: argparse.Namespace, name: str) -> list[Row]:
    """The rows of one configuration."""
    configuration = CONFIGURATIONS[name]
    size = {"gemm_size": TINY_GEMM} if args.tiny else {}
    run: dict[str, Callable[[Setup], list[Row]]] = {
        "steps": lambda setup: steps(setup, args.groups[name]),
        "flops": lambda setup: steps(setup, args.groups[name]),
        "generation": lambda setup: generation(setup, args.groups[name]),
        "sharing": lambda setup: sharing(setup, args.precision),
        "scaling": lambda setup: scaling(setup, args.precision),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), configuration)
        setup = Setup(Path(folder), configuration, args.threads, args.rounds, **size)
        return run[args.mode](setup)


def failed(row: Row) -> bool:
    """One of ours without figures, or anybody whose figures do not count."""
    return "disagrees" in row or ("why_not" in row and row.get("engine", "fastsd") == "fastsd")


if __name__ == "__main__":
    sys.exit(main())
