"""The four GEMMs of plan A: operands as stored, products accumulated and logits returned in fp32.

    fp32, fp64    torch.mm as it is.
    bf16 on CUDA  torch.mm(..., out_dtype=float32) on the bf16 operands.
    bf16 on CPU   torch has no bf16 GEMM with fp32 output. The operands are widened once a call and
                  torch.mm runs with oneDNN's "bf16" arithmetic, which narrows them again without
                  loss and accumulates and returns fp32: 2.4 x the fp32 GEMM. Where the processor
                  has no bf16 arithmetic the setting does nothing and the GEMM is fp32.
    fp16          widened to fp32: its range would flush small gradients.

The logits' gradient is rounded to bf16 for the gradient GEMMs of bf16 inputs; d head_VD is summed
over chunks in fp32. Shape suffixes: T rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor

from .contract import Inputs


class Products:
    """Projects row spans on the head and collects the gradients, with `wanted` for (h, W, b)."""

    def __init__(self, inputs: Inputs, wanted: tuple[bool, ...]):
        student, head, bias = inputs.student_TD, inputs.head_VD, inputs.bias_V
        teacher, teacher_head = inputs.teacher_TD, inputs.teacher_head_VD
        wide = inputs.statistics_dtype
        low = student.dtype == torch.bfloat16
        self._mixed_cuda = low and student.device.type == "cuda"
        self._mixed_cpu = low and student.device.type == "cpu" and _cpu_has_bf16()
        store = student.dtype if self._mixed_cuda else wide
        # Contiguous: equal hidden states then take the same path through the GEMM, bit for bit.
        self._head, self._student = head.to(store), student.to(store).contiguous()
        self._narrow_head = head if self._mixed_cpu else self._head
        self._hidden, self._heads = [self._student], [self._head]
        if teacher is not None:
            self._hidden.append(teacher.to(store).contiguous())
            self._heads.append(self._head if teacher_head is None else teacher_head.to(store))
        self._bias = None if bias is None else bias.to(wide)
        self._types = student.dtype, head.dtype, None if bias is None else bias.dtype
        rows, width = student.shape
        self._d_student = student.new_empty(rows, width) if wanted[0] else None
        self._d_head = head.new_zeros(head.shape, dtype=wide) if wanted[1] else None
        self._d_bias = None
        if wanted[2] and self._bias is not None:
            self._d_bias = torch.zeros_like(self._bias)

    def project(self, logits: list[Tensor], start: int, stop: int) -> None:
        """logits[stream] <- h[start:stop] W^T + b. Equal streams give equal bits."""
        for z_TV, hidden_TD, head_VD in zip(logits, self._hidden, self._heads, strict=True):
            if self._mixed_cuda:
                torch.mm(hidden_TD[start:stop], head_VD.T, out_dtype=z_TV.dtype, out=z_TV)
            else:
                with _bf16_arithmetic(self._mixed_cpu):
                    torch.mm(hidden_TD[start:stop], head_VD.T, out=z_TV)
            if self._bias is not None:
                z_TV.add_(self._bias)

    def add_gradients(self, g_TV: Tensor, free: Tensor | None, start: int, stop: int) -> None:
        """d h[start:stop] = g W, d W += g^T h, d b += sum g. `free`: scratch like g_TV, if any."""
        narrow = g_TV
        if self._mixed_cuda or (self._mixed_cpu and self._d_student is not None):
            narrow = _narrowed(g_TV, free)
        if self._d_student is not None:
            part_TD = self._d_student[start:stop]
            if narrow.dtype == part_TD.dtype:
                torch.mm(narrow, self._narrow_head, out=part_TD)
            else:
                part_TD.copy_(torch.mm(narrow, self._narrow_head))
        if self._d_head is not None:
            hidden_TD, sum_VD = self._student[start:stop], self._d_head
            if self._mixed_cuda:
                wide = sum_VD.dtype
                torch.addmm(sum_VD, narrow.T, hidden_TD, out_dtype=wide, out=sum_VD)
            else:
                with _bf16_arithmetic(self._mixed_cpu):
                    sum_VD.addmm_(g_TV.T, hidden_TD)
        if self._d_bias is not None:
            self._d_bias += g_TV.sum(0)

    def gradients(self) -> tuple[Tensor | None, ...]:
        found = (self._d_student, self._d_head, self._d_bias)
        return tuple(
            None if x is None else x.to(dtype) for x, dtype in zip(found, self._types, strict=True)
        )


def _narrowed(g_TV: Tensor, free: Tensor | None) -> Tensor:
    """g in bf16, in the memory of `free`: fresh memory would cost several times the rounding."""
    if free is None:
        return g_TV.to(torch.bfloat16)
    return free.view(-1).view(torch.bfloat16)[: g_TV.numel()].view(g_TV.shape).copy_(g_TV)


def _cpu_has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def _bf16_arithmetic(enabled: bool):
    """fp32 GEMMs on CPU multiply in bf16 and accumulate in fp32 within this block.

    The setting belongs to the process: an fp32 GEMM that another thread starts meanwhile is
    computed in bf16 too. torch offers no narrower way.
    """
    if not enabled:
        yield
        return
    setting = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
