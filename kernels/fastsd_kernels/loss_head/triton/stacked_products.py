"""The GEMMs of plan A on a GPU: logits of both streams as one product, everything out in fp32.

    logits    [h_s; h_t] W^T   one GEMM of 2c rows; two where the teacher has a head of its own
    d h       g W
    d W      += g^T h          summed over chunks in fp32

bf16 operands go to the tensor cores as they are and come out in fp32 (torch.mm's out_dtype): the
logits because rounding them to bf16 costs 3-5 % in the gradient, d h because a GEMM over V terms
may be split and its parts would be added in bf16. g is bf16 for bf16 inputs. fp16 is widened to
fp32: its range would flush small gradients. Torch has no mixed product on CPUs, where the
interpreter runs: bf16 operands are widened there, which changes no product.

Rows of the scratch start at multiples of 64 entries, so that both streams meet the same alignment
and loads are wide whatever V is. g of bf16 inputs has a buffer of its own: written over the
student's logits it would overtake threads that have not read theirs.
Shape suffixes: T rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import Inputs
from .scratch import Scratch

_ALIGNED = 64


def scratch_bytes_per_row(inputs: Inputs, gradient: bool) -> int:
    """Bytes of logits of all streams, and of g where it has its own buffer, for one row."""
    streams = 1 if inputs.teacher_TD is None else 2
    own = 2 if gradient and inputs.student_TD.dtype == torch.bfloat16 else 0
    return _padded(inputs.head_VD.shape[0]) * (4 * streams + own)


class StackedProducts:
    """Projects row spans on the head and collects the gradients, with `wanted` for (h, W, b)."""

    def __init__(self, inputs: Inputs, wanted: tuple[bool, bool, bool], chunk: int):
        self._inputs, self._wanted = inputs, wanted
        bf16 = inputs.student_TD.dtype == torch.bfloat16
        self._store = torch.bfloat16 if bf16 else torch.float32
        self._student, self._head = self._stored(inputs.student_TD), self._stored(inputs.head_VD)
        own = inputs.teacher_head_VD
        self._teacher_head = None if own is None else self._stored(own)
        self._bias = None if inputs.bias_V is None else inputs.bias_V.float().contiguous()
        streams = 1 if inputs.teacher_TD is None else 2
        self._logits_TV = self._rows(streams * chunk, torch.float32)
        narrow = bf16 and any(wanted)
        self._g_TV = self._rows(chunk, torch.bfloat16) if narrow else None
        self._d_student = torch.empty_like(inputs.student_TD) if wanted[0] else None
        self._d_head: Tensor | None = None
        self._d_bias: Tensor | None = None

    def project(self, start: int, stop: int) -> Scratch:
        """The logits of rows start to stop, without the bias, until the next call."""
        count, teacher = stop - start, self._inputs.teacher_TD
        hidden, logits = self._student[start:stop], self._logits_TV
        if teacher is None:
            multiply(hidden, self._head.T, logits[:count])
            return Scratch(logits[:count], None, self._bias)
        teacher = self._stored(teacher[start:stop])
        if self._teacher_head is None:
            multiply(torch.cat([hidden, teacher]), self._head.T, logits[: 2 * count])
        else:
            multiply(hidden, self._head.T, logits[:count])
            multiply(teacher, self._teacher_head.T, logits[count : 2 * count])
        return Scratch(logits[:count], logits[count : 2 * count], self._bias)

    def gradient_buffer(self, scratch: Scratch) -> Tensor:
        """Where dloss / dlogits of the scratch's rows goes, [T, V] bf16 or fp32."""
        if self._g_TV is None:
            return scratch.student_TV
        return self._g_TV[: scratch.student_TV.shape[0]]

    def add_gradients(self, g_TV: Tensor, start: int, stop: int) -> None:
        """d h[start:stop] = g W, d W += g^T h, d b += sum g."""
        hidden_TD = self._student[start:stop]
        if self._d_student is not None:
            part_TD = torch.empty_like(hidden_TD, dtype=torch.float32)
            multiply(g_TV, self._head, part_TD)
            self._d_student[start:stop] = part_TD
        if self._wanted[1]:
            first = self._d_head is None
            if self._d_head is None:
                self._d_head = torch.empty_like(self._head, dtype=torch.float32)
            multiply(g_TV.T, hidden_TD, self._d_head, add=not first)
        if self._wanted[2]:
            part_V = g_TV.sum(0, dtype=torch.float32)
            self._d_bias = part_V if self._d_bias is None else self._d_bias.add_(part_V)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of their inputs; None where not wanted, 0 for parameters if no rows."""
        inputs, wanted = self._inputs, self._wanted
        d_head, d_bias = self._d_head, self._d_bias
        if wanted[1] and d_head is None:
            d_head = torch.zeros_like(inputs.head_VD)
        if wanted[2] and d_bias is None and inputs.bias_V is not None:
            d_bias = torch.zeros_like(inputs.bias_V)
        return (
            self._d_student,
            None if d_head is None else d_head.to(inputs.head_VD.dtype),
            None if d_bias is None or inputs.bias_V is None else d_bias.to(inputs.bias_V.dtype),
        )

    def _stored(self, x: Tensor) -> Tensor:
        return x.to(self._store)

    def _rows(self, count: int, dtype: torch.dtype) -> Tensor:
        vocabulary, device = self._head.shape[0], self._head.device
        return torch.empty(count, _padded(vocabulary), dtype=dtype, device=device)[:, :vocabulary]


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _ALIGNED) * _ALIGNED


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """out (fp32) <- left right, or += with `add`; operands bf16 or fp32, sums in fp32."""
    if left.dtype != out.dtype and not left.is_cuda:
        left, right = left.float(), right.float()
    mixed: dict[str, Any] = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, left, right, out=out, **mixed)
    else:
        torch.mm(left, right, out=out, **mixed)
