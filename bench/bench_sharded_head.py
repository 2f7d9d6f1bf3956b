"""The loss head of two ranks: gathered against sharded by vocabulary, in a model that is all head.

One decoder layer below a head of its own, two gloo processes with one thread each, KL(T‖S) against
noisy teacher states in fp32: forward, loss head, backward, and what FSDP2 gathers and reduces, by
response tokens. Times are the median of process CPU seconds on rank 0, both layouts in turns; the
"network" is this machine's loopback. Memory is the rise of rank 0's resident set in one step.

    python -m bench.bench_sharded_head [--tokens 32,256,2048] [--json PATH]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from bench.common import measure
from bench.train_step.model import tokenizer

LAYOUTS = ("gathered", "sharded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="32,128,512,2048", help="response tokens of both ranks")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *launcher, "-m", "--", "bench.bench_sharded_head", *sys.argv[1:]]
        raise SystemExit(
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        )
    from fastsd.runtime.world import left_in_order

    with left_in_order():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """One rank's part; rank 0 prints."""
    from fastsd.runtime.world import open_world

    torch.set_num_threads(1)
    world = open_world(600.0, "cpu")
    cells = {layout: Cell(layout, arguments, world) for layout in LAYOUTS}
    rows, cpu = [], torch.device("cpu")
    for tokens in map(int, arguments.tokens.split(",")):
        steps = {n: partial(cell.step, tokens // world.size) for n, cell in cells.items()}
        memory = {name: measure.peak_memory(step, cpu)[0] for name, step in steps.items()}
        for step in steps.values():
            step()
        found = measure.interleave(steps, dict.fromkeys(steps, arguments.rounds), cpu)
        for name, timing in found.items():
            moved = cells[name].bytes_moved(tokens)
            row = {"tokens": tokens, "layout": name, "peak_bytes": memory[name], "moved": moved}
            rows.append(row | measure.timing_fields(timing))
    if world.leads:
        print_rows(rows)
        shown = ["--tokens", arguments.tokens]
        found = measure.record(
            "bench_sharded_head", cpu, rows, shown,
            vocabulary=arguments.vocabulary, hidden=arguments.hidden, ranks=world.size,
        )  # fmt: skip
        measure.write(found, arguments.json)


class Cell:
    """A model over the ranks with one layout of its head."""

    def __init__(self, layout: str, arguments: argparse.Namespace, world):
        from transformers import LlamaConfig, LlamaForCausalLM

        from fastsd.config import Config
        from fastsd.model import Policy, attention
        from fastsd.parallel.placement import Fsdp

        vocabulary, hidden = arguments.vocabulary, arguments.hidden
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden,
            num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8,
            tie_word_embeddings=False, initializer_range=hidden**-0.5,
            attn_implementation=attention.NAME,
        )  # fmt: skip
        self.policy = Policy(LlamaForCausalLM(shape).eval(), tokenizer(vocabulary))
        self.layout, self.shape = layout, (vocabulary, hidden)
        self.placement = Fsdp(Config(parallel={"head": layout}), self.policy, None, world)

    def step(self, tokens: int) -> None:
        """Forward and backward of one micro-batch with `tokens` response tokens on this rank."""
        from fastsd.types import Branch, TokenTree

        for parameter in self.policy.model.parameters():
            parameter.grad = None
        target_T = torch.arange(tokens) % self.shape[0]
        tree = TokenTree((1,), (Branch((), tuple(target_T.tolist())),))
        student_TD = self.policy.hidden([tree])
        noise_TD = torch.randn(student_TD.shape, generator=torch.Generator().manual_seed(1))
        teacher_TD = student_TD.detach() + 0.3 * noise_TD
        weight_T = torch.full((tokens,), 1 / tokens)
        options = {"teacher_TD": teacher_TD, "divergence_weight_T": weight_T}
        self.placement.loss_head(student_TD, target_T, options).loss.backward()
        self.placement.release()

    def bytes_moved(self, tokens: int) -> int:
        """For the head alone, as `fastsd.parallel.loss_head.head_layout` counts them."""
        vocabulary, hidden = self.shape
        each = tokens * (2 * 4 + 2 * 4) if self.layout == "sharded" else vocabulary * (4 + 4)
        return each * hidden


def print_rows(rows: list[dict]) -> None:
    print(
        f"{'tokens':>7} {'layout':>9} {'CPU s':>8} {'wall s':>8} {'peak MiB':>9} {'moved MiB':>10}"
    )
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        print(
            f"{row['tokens']:7d} {row['layout']:>9} {row['seconds']:8.3f} {row['wall']:8.3f} "
            f"{peak:>9} {row['moved'] / 2**20:10.1f}"
        )


if __name__ == "__main__":
    main()
