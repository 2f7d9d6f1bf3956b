"""The row kernels of plan A launched on the logits scratch, one program per row.

What they compute is in row_kernels.py. Configurations come from a table, not from the
number of rows. Grids have one axis, which reaches 2^31 rows.
Shape suffixes: T rows, V vocabulary, 9 row sums, E entry sums, C coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..contract import Inputs, Options
from .configs import AotCase, Capability, row_config
from .row_kernels import (
    entry_sums_kernel,
    gradient_kernel,
    row_sums_kernel,
    target_logits_kernel,
)


@dataclass(frozen=True)
class Scratch:
    """Products h W^T of some rows, [T, V] fp32 with one row stride for both streams.

    bias_V: fp32, added by the kernels. A product of -inf stands for no entry (on both sides).
    """

    student_TV: Tensor
    teacher_TV: Tensor | None
    bias_V: Tensor | None

    def with_bias_added(self) -> Scratch:
        """The bias in the products, in place, for who compares logits of different columns."""
        if self.bias_V is not None:
            for x_TV in (self.student_TV, self.teacher_TV):
                if x_TV is not None:
                    x_TV += self.bias_V
        return Scratch(self.student_TV, self.teacher_TV, None)


def logit_factors(options: Options) -> tuple[float, float]:
    """inner, outer: z = tanh(x inner) outer with a softcap, x inner without one."""
    if options.softcap is None:
        return options.logit_scale / options.temperature, 1.0
    return options.logit_scale / options.softcap, options.softcap / options.temperature


def row_sums(scratch: Scratch, target_T: Tensor, options: Options, sums_T9: Tensor) -> None:
    """sums_T9 <- the nine sums of sums.py, with shift = z_s[y] - z_t[y]."""
    student_TV, inner_outer = scratch.student_TV, logit_factors(options)
    launch(
        row_sums_kernel, student_TV.shape[0],
        student_TV, scratch.teacher_TV, scratch.bias_V, target_T, sums_T9,
        student_TV.shape[1], student_TV.stride(0), *inner_outer,
        TEACHER=scratch.teacher_TV is not None, BIAS=scratch.bias_V is not None,
        SOFTCAP=options.softcap is not None, **_config(student_TV, "row_sums"),
    )  # fmt: skip


def entry_sums(scratch: Scratch, options: Options, sums_T9: Tensor, entries_TE: Tensor) -> None:
    """entries_TE <- D, its centre, its held entries, 0, 0, of the divergence over all entries."""
    student_TV = scratch.student_TV
    launch(
        entry_sums_kernel, student_TV.shape[0],
        student_TV, scratch.teacher_TV, scratch.bias_V, sums_T9, entries_TE,
        student_TV.shape[1], student_TV.stride(0), *logit_factors(options),
        options.entry_clip or 0.0, options.beta,
        DIVERGENCE=options.divergence, CLIP=options.entry_clip is not None,
        BIAS=scratch.bias_V is not None, SOFTCAP=options.softcap is not None,
        **_config(student_TV, "entry_sums"),
    )  # fmt: skip


def row_gradients(
    scratch: Scratch, rows: Inputs, options: Options, coefficients_TC: Tensor, gradient_TV: Tensor
) -> None:
    """gradient_TV <- dloss / d(h W^T + b), in its dtype; it may be scratch.student_TV."""
    student_TV = scratch.student_TV
    weighed = rows.teacher_TD is not None and rows.divergence_weight_T is not None
    divergence = options.divergence if weighed else "none"
    if weighed and options.top_k is not None:
        divergence = "top_k" if options.tail else "none"
    sampled = divergence == "sampled_token"
    inner, outer = logit_factors(options)
    launch(
        gradient_kernel, student_TV.shape[0],
        student_TV, scratch.teacher_TV, scratch.bias_V, rows.target_T, coefficients_TC, gradient_TV,
        student_TV.shape[1], student_TV.stride(0), gradient_TV.stride(0),
        inner, outer, options.logit_scale / options.temperature,
        options.entry_clip or 0.0, options.beta,
        DIVERGENCE="none" if sampled else divergence, CLIP=options.entry_clip is not None,
        PULL=sampled or rows.policy_weight_T is not None,
        ENTROPY=rows.entropy_weight_T is not None, BIAS=scratch.bias_V is not None,
        SOFTCAP=options.softcap is not None, **_config(student_TV, "gradient"),
    )  # fmt: skip


def target_logits(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    options: Options,
    logits_T: Tensor,
) -> None:
    """logits_T <- z[y] of every row, summed in an order that does not depend on T."""
    hidden_TD, head_VD = (
        x if x.stride(1) == 1 else x.contiguous() for x in (hidden_TD, head_VD)
    )  # fmt: skip
    (rows, width), vocabulary = hidden_TD.shape, head_VD.shape[0]
    launch(
        target_logits_kernel, rows,
        hidden_TD, head_VD, bias_V, target_T, logits_T, vocabulary, width,
        hidden_TD.stride(0), head_VD.stride(0), *logit_factors(options),
        BIAS=bias_V is not None, SOFTCAP=options.softcap is not None,
        **_config(hidden_TD, "target_logits"),
    )  # fmt: skip


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Runs the kernel on one axis of programs; products and sums are not contracted."""
    kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


def _config(x: Tensor, kernel: str) -> dict[str, int]:
    return row_config(torch.cuda.get_device_capability(x.device) if x.is_cuda else None, kernel)


def aot_cases(capability: Capability) -> list[AotCase]:
    """Every kernel with none of its options and with all of them, for each divergence and dtype."""
    cases = []
    for teacher, every in product((False, True), repeat=2):
        flags = {"TEACHER": teacher, "BIAS": every, "SOFTCAP": every}
        cases.append(_aot_case("row_sums", row_sums_kernel, flags, capability))
    for divergence, every in product(("forward_kl", "reverse_kl", "jsd"), (False, True)):
        clip = every or divergence != "jsd"
        flags = {"DIVERGENCE": divergence, "CLIP": clip, "BIAS": every, "SOFTCAP": every}
        cases.append(_aot_case("entry_sums", entry_sums_kernel, flags, capability))
    for every in (False, True):
        flags = {"BIAS": every, "SOFTCAP": every}
        cases.append(_aot_case("target_logits", target_logits_kernel, flags, capability, "bf16"))
    kinds = ("none", "top_k", "forward_kl", "reverse_kl", "jsd")
    for divergence, every, dtype in product(kinds, (False, True), ("bf16", "fp32")):
        flags = dict.fromkeys(("CLIP", "PULL", "ENTROPY", "BIAS", "SOFTCAP"), every)
        flags |= {"DIVERGENCE": divergence}
        cases.append(_aot_case("gradient", gradient_kernel, flags, capability, dtype))
    return cases


def _aot_case(
    name: str, kernel: Any, flags: dict[str, Any], capability: Capability, dtype: str = "fp32"
) -> AotCase:
    config = row_config(capability, name)
    warps = config.pop("num_warps")
    constants = flags | config
    alone = flags.get("TEACHER") is False or flags.get("DIVERGENCE") in ("none", "top_k")
    missing = {"teacher": alone and name == "row_sums", "bias": not flags["BIAS"]}
    constants |= {argument: None for argument, left_out in missing.items() if left_out}
    types = {"vocabulary": "i32", "width": "i32", "target": "*i64"}
    types |= dict.fromkeys(("gradient", "hidden", "head"), f"*{dtype}")
    types |= dict.fromkeys((name for name in kernel.arg_names if name.endswith("stride")), "i32")
    types |= dict.fromkeys(("inner", "outer", "slope", "clip", "beta"), "fp32")  # fmt: skip
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    divisible = tuple(
        argument for argument, kind in signature.items()
        if kind.startswith("*") or argument.endswith("stride")
    )  # fmt: skip
    shown = [dtype] + [f"{key}={value}" for key, value in flags.items()]
    return AotCase(" ".join([name, *shown]), kernel, signature, constants, divisible, warps)
