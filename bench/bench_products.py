"""The products and draws below everything else on a CPU, ours beside what torch calls by itself.

    python -m bench.bench_products [--rounds 7] [--json PATH]

Four groups at SmolLM2-135M's shapes, one thread. layer: fp32 linear layers over 1,024 rows, forward
and both gradients, torch's own GEMM and oneDNN's (`fastsd.model.cpu_linear`). head: bf16 operands
with an fp32 result, as an fp32 GEMM of widened operands, and as oneDNN narrows those again
(`fastsd_kernels.loss_head`). decode: a few rows times weights packed once (`PackedLinear`), and
torch.nn.functional.linear. draw: a token for each of 32 rows of logits, greedy by argmax and by the
sort that any other top_k takes, and from the whole distribution in C++ and in torch.

The two ways of a pair take turns; times are medians of process CPU time. `difference` is the
largest one over the largest entry.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.common import measure
from fastsd.model.cpu_linear import onednn_product
from fastsd_kernels import PackedLinear, sample_from_logits

SCRIPT = "bench/bench_products.py"
CPU = torch.device("cpu")
# K inputs, N outputs.
LAYERS = ((576, 576), (576, 192), (576, 1536), (1536, 576))
HIDDEN, VOCABULARY = 576, 49152
ROWS, DECODE_ROWS, DRAW_ROWS = 1024, (1, 8, 64), 32
LEAST_S = 0.02


class Pair(NamedTuple):
    """Two ways to one result, torch's first; flop of one call, 0 for a draw."""

    group: str
    what: str
    dtype: torch.dtype
    flop: int
    runs: dict[str, partial]


def layers(scale: int) -> Iterator[Pair]:
    rows = ROWS // scale
    for inputs, outputs in ((k // scale, n // scale) for k, n in LAYERS):
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        grad = torch.randn(rows, outputs)
        products = {"forward": (x, weight), "d input": (grad, weight.T), "d weight": (grad.T, x.T)}
        for name, (left, right) in products.items():
            runs = {"torch": partial(torch.mm, left, right.T),
                    "oneDNN": partial(onednn_product, left, right)}  # fmt: skip
            what = f"{inputs} to {outputs}, {name}"
            yield Pair("layer", what, torch.float32, 2 * rows * inputs * outputs, runs)


def narrowed(x: Tensor, y: Tensor) -> Tensor:
    """x y of fp32 tensors that hold bf16 numbers, exactly, in fp32."""
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        return torch.mm(x, y)
    finally:
        setting.fp32_precision = before


def head(scale: int) -> Iterator[Pair]:
    rows, columns = ROWS // scale, VOCABULARY // scale
    x, y = (torch.randn(*shape).bfloat16().float() for shape in ((rows, HIDDEN), (HIDDEN, columns)))
    runs = {"torch": partial(torch.mm, x, y), "narrowed": partial(narrowed, x, y)}
    yield Pair("head", f"{rows} rows", torch.bfloat16, 2 * rows * HIDDEN * columns, runs)


def decode(scale: int) -> Iterator[Pair]:
    for dtype in (torch.float32, torch.bfloat16):
        for outputs in (1536 // scale, VOCABULARY // scale):
            weight = torch.randn(outputs, HIDDEN).to(dtype)
            packed = PackedLinear(weight)
            for rows in DECODE_ROWS:
                x = torch.randn(rows, HIDDEN).to(dtype)
                runs = {"torch": partial(linear, x, weight), "packed": partial(packed, x)}
                what = f"{rows} rows, {HIDDEN} to {outputs}"
                yield Pair("decode", what, dtype, 2 * rows * HIDDEN * outputs, runs)


def draws(scale: int) -> Iterator[Pair]:
    logits, uniform = torch.randn(DRAW_ROWS, VOCABULARY // scale), torch.rand(DRAW_ROWS).double()
    draw = partial(sample_from_logits, logits, uniform)
    greedy = {"sort": partial(draw, top_k=2), "argmax": partial(draw, top_k=1)}
    whole = {"torch": partial(draw, impl="torch"), "native": partial(draw, impl="native")}
    for what, runs in (("greedy", greedy), ("whole vocabulary", whole)):
        yield Pair("draw", what, torch.float32, 0, runs)


def measured(pair: Pair, rounds: int) -> list[dict]:
    """A row for each way. A call below 20 ms is repeated: the process's clock is not that fine."""
    first, other = (run() for run in pair.runs.values())
    difference = (first - other).float().abs().max() / first.float().abs().max() if pair.flop else 0
    longest = max(measure.time_once(run, CPU)[0] for run in pair.runs.values())
    times = math.ceil(LEAST_S / max(longest, 1e-5))

    def repeated(run: partial) -> None:
        for _ in range(times):
            run()

    runs = {name: partial(repeated, run) for name, run in pair.runs.items()}
    found = measure.interleave(runs, dict.fromkeys(runs, rounds), CPU)
    base = next(iter(found.values())).seconds
    return [
        {"group": pair.group, "what": pair.what, "dtype": str(pair.dtype).removeprefix("torch."),
         "way": name, "ms": 1e3 * timing.seconds / times, "x": base / timing.seconds,
         "gflop_per_s": pair.flop * times / timing.seconds / 1e9, "difference": float(difference)}
        for name, timing in found.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=int, default=1, help="divides the shapes, for tests")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure.keep_freed_memory(True)  # as the Makefile sets it for training
    rows = []
    print("| | | dtype | way | CPU ms | faster | GFLOP/s | difference |\n" + 8 * "|---" + "|")
    for group in (layers, head, decode, draws):
        for pair in group(arguments.scale):
            for row in measured(pair, arguments.rounds):
                cells = (f"{v:.3g}" if isinstance(v, float) else v for v in row.values())
                print(f"| {' | '.join(cells)} |", flush=True)
                rows.append(row)
    words = sys.argv[1:] if argv is None else list(argv)
    measure.write(measure.record(SCRIPT, CPU, rows, words, threads=1), arguments.json)


if __name__ == "__main__":
    main()
