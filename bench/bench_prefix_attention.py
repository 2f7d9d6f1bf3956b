"""Shared-prefix attention on a CPU: ours, torch's flash kernels merged, and torch without sharing.

    python -m bench.bench_prefix_attention [--rounds 7] [--json figures.json]

Forward and backward over a packed tree, in fp32 and bf16. `unshared` is what a trainer without
sharing calls: scaled_dot_product_attention (causal, grouped queries) on full rows, the prefix
repeated in each, rows of one length side by side. All take turns within a round; times are medians
of process CPU time, memory the rise of the resident set in one forward and backward. Errors are the
relative L2 of the output and the worst gradient against the dense definition in fp64. The last line
is one JSON object.

Shapes: T tokens of the pack, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.common import measure
from fastsd_kernels import PrefixTree, shared_prefix_attention
from fastsd_kernels.testing import relative_error

SCRIPT = "bench/bench_prefix_attention.py"
CPU = torch.device("cpu")


def group(*lengths: int, branches: int) -> tuple[list[int], list[int | None]]:
    """A chain of prefixes, then so many branches as long as the last of `lengths`."""
    chain: list[int | None] = [None, *range(len(lengths) - 2)]
    prefixes = list(lengths[:-1])
    return [*prefixes, *[lengths[-1]] * branches], [*chain, *[len(prefixes) - 1] * branches]


def questions(count: int, prefix: int, branch: int, branches: int):
    lengths, parents = group(prefix, branch, branches=branches)
    size = len(lengths)
    shifted = [[None if p is None else p + i * size for p in parents] for i in range(count)]
    return lengths * count, sum(shifted, [])


# name: tree, N, K, H
CELLS = {
    "question 256, 8 x 64": (group(256, 64, branches=8), 9, 3, 64),
    "question 256, feedback 256, 8 x 64": (group(256, 256, 64, branches=8), 9, 3, 64),
    "question 256, 8 x (256 + 64)": (group(256, 320, branches=8), 9, 3, 64),
    "question 1024, 8 x 128": (group(1024, 128, branches=8), 9, 3, 64),
    "question 512, 4 x 512, H 128": (group(512, 512, branches=4), 16, 4, 128),
    "16 questions of 24, 8 x 18": (questions(16, 24, 18, 8), 4, 4, 24),
}


def paths(tree: PrefixTree) -> list[Tensor]:
    """Of every leaf the rows of the pack from its root to its end."""
    leaves = set(range(len(tree.lengths))) - set(tree.parents)
    found = []
    for leaf in sorted(leaves):
        spans, at = [], leaf
        while at is not None:
            spans.insert(0, torch.arange(*tree.keys(at)))
            at = tree.parents[at]
        found.append(torch.cat(spans))
    return found


def unshared(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    """[leaves, N, path, H]: every leaf's whole row, as one padded-free batch."""
    full = (x[rows].transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*full, is_causal=True, enable_gqa=True)


def forward(inputs: Sequence[Tensor], run: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return run(*inputs)


def both(inputs: Sequence[Tensor], run: Callable[..., Tensor]) -> list[Tensor]:
    out = run(*inputs)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    out, *gradients = (
        relative_error(a.detach(), b.detach()) for a, b in zip(found, exact, strict=True)
    )
    return out, max(gradients)


def measure_cell(name: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    (lengths, parents), heads, kv_heads, head_dim = CELLS[name]
    tree = PrefixTree(lengths, parents)
    generator = torch.Generator().manual_seed(0)
    shapes = [(tree.tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    rows = torch.stack(paths(tree))
    ours = {i: partial(shared_prefix_attention, tree=tree, impl=i) for i in ("native", "torch")}
    contestants: dict[str, Callable] = {**ours, "unshared": partial(unshared, rows=rows)}
    widened = [x.detach().double().requires_grad_() for x in inputs]
    exact = both(widened, partial(shared_prefix_attention, tree=tree, impl="reference"))
    facts, runs = {}, {}
    for label, run in contestants.items():
        peak, found = measure.peak_memory(partial(both, inputs, run), CPU)
        facts[label] = {"peak_bytes": peak}
        if label != "unshared":  # whose loss counts shared rows as often as they are repeated
            out_error, gradient_error = errors(found, exact)
            facts[label] |= {"out_error": out_error, "gradient_error": gradient_error}
        runs[label, "forward"] = partial(forward, inputs, run)
        runs[label, "both"] = partial(both, inputs, run)
    measure.hold_pages(256 << 20, CPU)
    named = {" ".join(key): run for key, run in runs.items()}
    for run in named.values():
        run()
    timings = measure.interleave(named, dict.fromkeys(named, rounds), CPU)
    return [
        {"cell": name, "dtype": str(dtype).removeprefix("torch."), "contestant": label}
        | {f"{what}_s": timings[f"{label} {what}"].seconds for what in ("forward", "both")}
        | facts[label]
        for label in contestants
    ]


def line(row: dict, base: dict) -> str:
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    error = f"{row['out_error']:.0e} {row['gradient_error']:.0e}" if "out_error" in row else "-"
    cells = [row["cell"], row["dtype"], row["contestant"]]
    for what in ("forward_s", "both_s"):
        cells.append(f"{1e3 * row[what]:.2f} ({row[what] / base[what]:.1f})")
    return "| " + " | ".join([*cells, peak, error]) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", nargs="*", default=list(CELLS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print("| tree | dtype | | forward ms | forward + backward ms | peak MiB | errors |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in arguments.cells:
        for dtype in (torch.float32, torch.bfloat16):
            found = measure_cell(name, dtype, arguments.rounds)
            for row in found:
                print(line(row, found[0]), flush=True)
            rows += found
    words = sys.argv[1:] if argv is None else list(argv)
    measure.write(measure.record(SCRIPT, CPU, rows, words), arguments.json)


if __name__ == "__main__":
    main()
