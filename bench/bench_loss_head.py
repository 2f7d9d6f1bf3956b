"""Loss head, forward + backward, against its floor and the best public code, in one run.

    python bench/bench_loss_head.py [--tokens 1024] [--hidden 576] [--vocabulary 49152] [--rounds 3]

Floor: the four bare GEMMs of the same shapes, 4 * 2*T*D*V FLOP, in bf16. All contestants see the
same bf16 inputs, take turns within each round, and are reported by the median of their process CPU
time on one thread. Every contestant's gradient is compared with fp64 on a slice of rows first.
Shapes: T tokens, D hidden, V vocabulary. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.testing import relative_error

Loss = Callable[[Tensor, Tensor], Tensor]


def contestants(teacher_TD: Tensor, target_T: Tensor) -> dict[str, Loss]:
    """Sum over tokens of KL(T||S), from (student_TD, head_VD), by implementation."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def ours(impl: str) -> Loss:
        return lambda student_TD, head_VD: (
            fused_linear_loss(
                student_TD, head_VD, target_T, teacher_TD=teacher_TD.to(student_TD), impl=impl
            ).loss
        )

    def eager(student_TD: Tensor, head_VD: Tensor) -> Tensor:
        student_TV = torch.log_softmax((student_TD @ head_VD.T).float(), -1)
        with torch.no_grad():
            teacher_TV = torch.log_softmax((teacher_TD @ head_VD.T).float(), -1)
        return F.kl_div(student_TV, teacher_TV, log_target=True, reduction="sum")

    def trl(student_TD: Tensor, head_VD: Tensor) -> Tensor:
        options = (None, 0.0, 1.0, 1.0, None, 1.0, None)
        head = (head_VD, None, teacher_TD, head_VD.detach())
        return ChunkedDivergenceFunction.apply(student_TD, *head, *options)[0].sum()

    return {
        "fastsd chunked": ours("chunked"),
        "eager, fp32 logits": ours("reference"),
        "eager, bf16 logits": eager,
        "TRL chunked divergence": trl,
    }


def gradients(loss: Loss, student_TD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    leaves = student_TD.clone().requires_grad_(), head_VD.clone().requires_grad_()
    loss(*leaves).backward()
    return leaves[0].grad, leaves[1].grad  # type: ignore[return-value]


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("tokens", 1024), ("hidden", 576), ("vocabulary", 49152), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    shape = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student_TD = torch.randn(shape.tokens, shape.hidden).bfloat16()
    teacher_TD = (student_TD.float() + 0.3 * torch.randn(student_TD.shape)).bfloat16()
    head_VD = (torch.randn(shape.vocabulary, shape.hidden) * shape.hidden**-0.5).bfloat16()
    target_T = torch.randint(shape.vocabulary, (shape.tokens,))

    rows = min(64, shape.tokens)
    small = contestants(teacher_TD[:rows], target_T[:rows])
    exact = gradients(small["eager, fp32 logits"], student_TD[:rows].double(), head_VD.double())
    errors = {}
    for name, loss in small.items():
        found = gradients(loss, student_TD[:rows], head_VD)
        errors[name] = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    assert max(errors["fastsd chunked"]) <= 3e-3, f"wrong gradients, no times: {errors}"

    upstream_TV = torch.randn(shape.tokens, shape.vocabulary).bfloat16()
    runs: dict[str, Callable[[], object]] = {
        "four bare GEMMs": lambda: (
            student_TD @ head_VD.T,
            teacher_TD @ head_VD.T,
            upstream_TV @ head_VD,
            upstream_TV.T @ student_TD,
        )
    }
    for name, loss in contestants(teacher_TD, target_T).items():
        runs[name] = lambda loss=loss: gradients(loss, student_TD, head_VD)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(shape.rounds + 1):
        for name, run in runs.items():
            seconds = cpu_seconds(run)
            if round_number:  # the first round warms up
                times[name].append(seconds)
    floor = statistics.median(times["four bare GEMMs"])
    print(f"{'':24}  CPU ms   x floor   error d hidden, d head (fp64, {rows} rows)")
    for name, values in times.items():
        median = statistics.median(values)
        error = "  ".join(f"{e:.1e}" for e in errors.get(name, []))
        print(f"{name:24} {1000 * median:7.0f} {median / floor:9.2f}   {error}")
    result = {name: statistics.median(values) for name, values in times.items()}
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    print(json.dumps({**vars(shape), **facts, "cpu_seconds": result, "errors": errors}))


if __name__ == "__main__":
    main()
