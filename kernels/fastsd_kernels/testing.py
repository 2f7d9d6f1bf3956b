"""What tests of kernels share: input factories, error budgets, NaN poisoning, a work meter.

Budgets are relative L2 errors against the fp64 reference on the same inputs. They derive from the
unit roundoffs u: fp32 sums of products of unit scale stay within 2e-6 (about 30 u); larger logits
multiply the rounding of z, hence 1e-5 at scale 8; bf16 gradients carry two roundings to bf16 of
rms error 2^-9 / sqrt(3) = 1.1e-3 each (the logits' gradient, the result), within 3e-3.
Shape suffixes: T rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .loss_head import op

FP32_ERROR = 2e-6
FP32_ERROR_AT_SCALE_8 = 1e-5
BF16_GRADIENT_ERROR = 3e-3


def loss_head_inputs(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Random student, teacher, head, bias, targets and weights; logits of about unit scale."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "student_TD": normal(rows, width).requires_grad_(),
        "head_VD": (normal(vocabulary, width) * width**-0.5).requires_grad_(),
        "target_T": torch.randint(0, vocabulary, (rows,), generator=g),
        "teacher_TD": normal(rows, width),
        "bias_V": (normal(vocabulary) * 0.3).requires_grad_(),
        "divergence_weight_T": torch.rand(rows, generator=g),
        "policy_weight_T": torch.randn(rows, generator=g),
        "old_logprob_T": -4 * torch.rand(rows, generator=g),
        "entropy_weight_T": torch.rand(rows, generator=g),
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| in L2; absolute where exact is all zero."""
    difference = torch.linalg.vector_norm(found.double() - exact.double())
    norm = torch.linalg.vector_norm(exact.double())
    return float(difference / norm) if norm > 0 else float(difference)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty is full of NaN (integers: the largest), so reading unwritten memory shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch fills empty tensors in this mode only
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class WorkMeter(TorchDispatchMode):
    """Within it: FLOP of matrix products, and bytes of the largest tensor any operator returned."""

    _PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul")

    _BODIES = {
        torch.ops.fastsd_kernels.linear_loss.default: op.run_loss,
        torch.ops.fastsd_kernels.linear_statistics.default: op.run_statistics,
    }

    def __init__(self):
        super().__init__()
        self.product_flop = 0
        self.products = 0
        self.largest_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self._BODIES:
            with self:  # our operators count as what they do
                return self._BODIES[func](*args)
        result = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in self._PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.products += 1
            self.product_flop += 2 * prod(left.shape) * right.shape[-1]
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [x.nbytes for x in outputs if isinstance(x, Tensor)]
        self.largest_bytes = max([self.largest_bytes, *sizes])
        return result
