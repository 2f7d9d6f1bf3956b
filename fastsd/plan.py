"""`python -m fastsd.plan CONFIG.toml --hardware 8xH100`: what a run will cost, before it runs.

Reads the configuration and the model's config.json, no weights, and prints for each phase of an
optimizer step the counted operations, bytes and tokens, with and without shared prefixes; memory by
part; a predicted range of seconds and what limits it; and the largest micro-batch that fits. Counts
are exact for the lengths given. Seconds are predictions from data sheets and the assumptions that
are printed with them, or, with --hardware cpu, from rates measured here on the spot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsd.planning.hardware import Fleet
    from fastsd.planning.step import Asked, Plan

_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see `python -m fastsd.plan --help`."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments, rest = _parser().parse_known_args(words)

    def run() -> None:
        from fastsd.conditions import conditions_of
        from fastsd.config import for_condition, load_config
        from fastsd.planning.hardware import PlanError
        from fastsd.planning.step import make_plan, refuse_contradictions
        from fastsd.planning.table import render_plan, to_json

        asked = _asked(arguments)
        config = load_config(rest).config
        refuse_contradictions(config, asked)
        _set_threads(config.threads)
        plans = [
            make_plan(for_condition(config, name), asked)
            for name in conditions_of(config.condition)
        ]
        if arguments.json:
            _print(json.dumps({"plans": [to_json(plan) for plan in plans]}))
        else:
            _print("\n\n".join(render_plan(plan) for plan in plans))
        short = next((plan for plan in plans if plan.missing), None)
        if short is not None:
            raise PlanError(_too_large(short))

    from fastsd.runtime.program import run_main

    return run_main(run)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastsd.plan",
        usage="python -m fastsd.plan [CONFIG.toml ...] [--section.key VALUE ...] --hardware 8xH100",
        description=__doc__,
        epilog="Configuration files and flags are those of python -m fastsd.train.",
        allow_abbrev=False,
    )
    hardware = "COUNTxNAME of fastsd/planning/hardware_table.toml"
    tokens = {
        "question": "mean tokens of a question's prompt",
        "feedback": "mean tokens that the teacher's prompt adds to it",
        "response": "mean tokens of a response",
        "critique": "mean tokens that a model as critic writes, thinking included",
    }
    parser.add_argument("--hardware", required=True, help=f'of the trainer: {hardware}, or "cpu"')
    parser.add_argument("--rollout-hardware", help=f"of the rollouts' servers: {hardware}")
    parser.add_argument("--critic-hardware", help=f"of the critic's servers: {hardware}")
    for name, text in tokens.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: the limit)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def _asked(arguments: argparse.Namespace) -> Asked:
    from fastsd.planning.hardware import PlanError, parse_hardware
    from fastsd.planning.step import Asked

    lengths = {
        name: getattr(arguments, name) for name in ("question", "feedback", "response", "critique")
    }
    for name, value in lengths.items():
        if value is not None and value < 1:
            raise PlanError(f"--{name} {value}: must be at least 1 token")
    here = arguments.hardware.strip().lower() == "cpu"

    def fleet(flag: str, value: str | None) -> Fleet | None:
        return None if value is None else parse_hardware(value, flag)

    return Asked(
        fleet=None if here else fleet("--hardware", arguments.hardware),
        rollouts=fleet("--rollout-hardware", arguments.rollout_hardware),
        critics=fleet("--critic-hardware", arguments.critic_hardware),
        **lengths,
    )


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _too_large(plan: Plan) -> str:
    more = f"change {'; or '.join(plan.changes)}" if plan.changes else "choose other hardware"
    return (
        f"does not fit: a device of {plan.hardware} needs {plan.memory.peak / _GIB:.1f} GiB and "
        f"{plan.capacity / _GIB:.1f} can be used, {plan.missing / _GIB:.1f} too few "
        f"({plan.memory.moment}): {more}"
    )


if __name__ == "__main__":
    sys.exit(main())
