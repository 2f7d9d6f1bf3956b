"""Prompts that begin alike, prefilled together and each by itself: tokens and process CPU time.

    python -m bench.bench_prefill [--prompts 32] [--instruction 600] [--own 218] [--json PATH]

The prompts of a batch of critiques: one instruction, then each attempt. `together` packs them as
the sampler does (`fastsd.rollout.prefill`: blocks of 64 tokens, equal ones once); `apart` does the
same for prompts of these lengths that have nothing in common; `alone` takes one prompt after the
other. The model has SmolLM2-135M's shape and random weights, its layers packed for rollouts. First
the hidden states of a few prompts, together and alone, must be equal; then the ways take turns.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.common import measure
from bench.train_step.model import save_model
from bench.train_step.problem import CONFIGURATIONS, SPECIAL
from fastsd.config.sections import ModelConfig
from fastsd.model import Policy, load_policy
from fastsd.model.packed_layers import packed_layers
from fastsd.model.packing import Pack, PrefixKeys
from fastsd.rollout.prefill import prompt_trees
from fastsd_kernels.testing import relative_error

SCRIPT = "bench/bench_prefill.py"
CPU = torch.device("cpu")
# As many tokens at once as the sampler takes.
MOST_TOKENS = 16384
MOST_ERROR = 1e-4


def prompts_of(
    count: int, instruction: int, own: int, vocabulary: int, shared: bool = True
) -> list[tuple[int, ...]]:
    draw = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(len(SPECIAL), vocabulary) for _ in range(length))

    instructions = (
        [ids(instruction)] * count if shared else [ids(instruction) for _ in range(count)]
    )
    return [before + ids(own) for before in instructions]


def packs_of(groups: Sequence[list[tuple[int, ...]]]) -> list[Pack]:
    """joined as the sampler has it with the C++ attention: blocks stay segments of their own."""
    trees = [tree for group in groups for tree in prompt_trees(group, MOST_TOKENS)]
    return [tree.pack(joined=False)[0] for tree in trees]


def prefill(policy: Policy, packs: list[Pack]) -> Tensor:
    """The last hidden state of every prompt, its keys and values kept for the length of a pack."""
    with torch.no_grad():
        return torch.cat([policy.run(pack, fills=PrefixKeys()) for pack in packs])


def check(policy: Policy, few: list[tuple[int, ...]]) -> float:
    """The difference that sharing makes. Raises ArithmeticError where it is one."""
    ways = packs_of([few]), packs_of([[prompt] for prompt in few])
    together, alone = (prefill(policy, packs) for packs in ways)
    if not (error := relative_error(together, alone)) <= MOST_ERROR:
        raise ArithmeticError(f"the hidden states differ by {error:.1e}")
    return error


def measured(policy: Policy, prompts, others, rounds: int) -> list[dict[str, object]]:
    packs = {
        "together": packs_of([prompts]),
        "apart": packs_of([others]),
        "alone": packs_of([[prompt] for prompt in prompts]),
    }
    with packed_layers(policy):
        error = check(policy, prompts[:4])
        runs = {name: partial(prefill, policy, one) for name, one in packs.items()}
        found = measure.interleave(runs, dict.fromkeys(runs, rounds), CPU)
    return [
        {"prefill": name, "prompts": len(prompts), "tokens": sum(len(p.ids_T) for p in one)}
        | {"difference": error}
        | measure.timing_fields(found[name])
        for name, one in packs.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configuration", choices=list(CONFIGURATIONS), default="smollm2")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--instruction", type=int, default=600)
    parser.add_argument("--own", type=int, default=218)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    measure.keep_freed_memory(True)  # as the Makefile sets it for training
    configuration, rows = CONFIGURATIONS[arguments.configuration], []
    sizes = arguments.prompts, arguments.instruction, arguments.own, configuration.vocabulary
    prompts, others = prompts_of(*sizes), prompts_of(*sizes, shared=False)
    print("| dtype | prefill | tokens | CPU s (least to most) | wall s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), configuration)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            policy = load_policy(ModelConfig(name=folder), "cpu", dtype)
            for row in measured(policy, prompts, others, arguments.rounds):
                rows.append({"dtype": name} | row)
                print(f"| {name} | {row['prefill']} | {row['tokens']:,} | {row['seconds']:.2f} "
                      f"({row['least']:.2f} to {row['most']:.2f}) | {row['wall']:.2f} |",
                      flush=True)  # fmt: skip
    words = sys.argv[1:] if argv is None else list(argv)
    facts = {"configuration": configuration.to_json(), "threads": 1}
    measure.write(measure.record(SCRIPT, CPU, rows, words, **facts), arguments.json)


if __name__ == "__main__":
    main()
