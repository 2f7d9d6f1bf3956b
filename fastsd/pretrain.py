"""python -m fastsd.pretrain: makes a base checkpoint to train from.

chain_sum is the model of the embedded experiment, trained from nothing; smollm2 is a published
model warmed up on the format of word_problems.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastsd.errors import FastsdError
from fastsd.runtime.program import run_main


class NoHealthyBase(FastsdError):
    """No seed passed the gate."""

    exit_code = 1


def main(argv: Sequence[str] | None = None) -> int:
    """0: a healthy base was written. 1: no seed passed the gate. 2: bad arguments or input."""
    arguments = _parser().parse_args(argv)
    return run_main(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m fastsd.pretrain", description=__doc__, formatter_class=formatter
    )
    bases = parser.add_subparsers(required=True, metavar="chain_sum|smollm2")
    chain_sum = bases.add_parser("chain_sum", help="the embedded model, from nothing")
    chain_sum.set_defaults(run=_chain_sum)
    chain_sum.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    chain_sum.add_argument("--seed", type=int, help="the first seed to try")
    chain_sum.add_argument("--max-seeds", type=int, default=4, help="give up after that many")
    chain_sum.add_argument("--steps", type=int, help="updates")
    chain_sum.add_argument("--lr", type=float, help="learning rate")
    smollm2 = bases.add_parser("smollm2", help="SmolLM2-135M-Instruct, warmed up for word_problems")
    smollm2.set_defaults(run=_smollm2)
    smollm2.add_argument("--out", type=Path, required=True, help="folder for the warmed-up model")
    smollm2.add_argument("--updates", type=int, help="updates of the warm-up")
    smollm2.add_argument("--seed", type=int, help="seed of the warm-up's examples")
    smollm2.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    return parser


def _given(arguments: argparse.Namespace, *names: str) -> dict:
    """Those of the arguments that were given; the others keep the recipe's own values."""
    return {name: v for name in names if (v := getattr(arguments, name)) is not None}


def _chain_sum(arguments: argparse.Namespace) -> None:
    import torch

    from fastsd.pretraining.base import HealthGate, Recipe, pretrain

    torch.set_num_threads(1)  # at this size one thread is faster than two
    recipe, seeds = Recipe(**_given(arguments, "seed", "steps", "lr")), arguments.max_seeds
    if not pretrain(arguments.out, recipe, HealthGate(), seeds):
        raise NoHealthyBase(f"no seed of {seeds} passed the gate; try another --seed")
    print(f"saved in {arguments.out}")


def _smollm2(arguments: argparse.Namespace) -> None:
    import torch

    from fastsd.pretraining.smollm2 import make_base

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    health = make_base(arguments.out, **_given(arguments, "updates", "seed"))
    print(f"{arguments.out}: " + ", ".join(f"{n} {p:.3f}" for n, p in asdict(health).items()))


if __name__ == "__main__":
    sys.exit(main())
