"""Next tokens from last hidden states: the sampler's end of the language-model head.

One inverse-CDF draw per row from a uniform number that the caller supplies, so that randomness is
keyed by what a row *is* and never by where it stands in a batch.

Shapes: B rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import native_library


def sample_tokens(
    hidden_BD: Tensor,
    head_VD: Tensor,
    uniform_B: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draws one token per row of p = softmax(z), z = softcap(scale * (h W^T + b)) / temperature.

    hidden_BD and head_VD floating (upcast to fp32), uniform_B in [0, 1). top_k = 0 and top_p = 1
    keep everything; otherwise the draw is from the k likeliest tokens, then from the smallest set
    of those whose mass reaches top_p. Returns (token_B int64, logprob_B fp32) where logprob is
    log p of the *untruncated* distribution: what a policy-gradient ratio needs.

    Raises ValueError on shapes that do not match and on options out of range.
    """
    if hidden_BD.ndim != 2 or head_VD.ndim != 2 or hidden_BD.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"hidden_BD and head_VD must be [B, D] and [V, D], got {tuple(hidden_BD.shape)} and "
            f"{tuple(head_VD.shape)}"
        )
    return sample_from_logits(
        hidden_BD.float() @ head_VD.float().T,
        uniform_B,
        bias_V=bias_V,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        top_k=top_k,
        top_p=top_p,
    )


def sample_from_logits(
    logits_BV: Tensor,
    uniform_B: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`sample_tokens` for head products that are there already: logits_BV = h W^T, fp32.

    logits_BV is overwritten. impl: "torch" (any device), "native" (the C++ library, CPU, the whole
    vocabulary; a row's token does not depend on the other rows to the bit) or "auto", native where
    it can run. Returns and raises as `sample_tokens`, and RuntimeError with the reason where
    impl="native" cannot run.
    """
    _validate(logits_BV, uniform_B, temperature, top_k, top_p)
    if bias_V is not None:
        logits_BV += bias_V.float()
    if logit_scale != 1.0:
        logits_BV *= logit_scale
    if softcap is not None:
        logits_BV.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        logits_BV /= temperature
    truncated = 0 < top_k < logits_BV.shape[-1] or top_p < 1.0
    if _implementation(impl, logits_BV, truncated) == "native":
        return _draw_native(logits_BV, uniform_B)
    lse_B1 = logits_BV.logsumexp(-1, keepdim=True)
    if truncated:
        token_B1 = _draw_truncated(logits_BV, uniform_B, top_k, top_p)
    else:
        mass_BV = (logits_BV - lse_B1).exp_().cumsum(-1)
        token_B1 = _draw(mass_BV, uniform_B)
    logprob_B1 = logits_BV.gather(-1, token_B1) - lse_B1
    return token_B1.squeeze(-1), logprob_B1.squeeze(-1)


def _implementation(impl: str, logits_BV: Tensor, truncated: bool) -> str:
    if impl not in ("auto", "native", "torch"):
        raise ValueError(f"impl: expected 'auto', 'native' or 'torch', got {impl!r}")
    if impl == "torch":
        return impl
    if not logits_BV.is_cpu:
        reason = f"it runs on CPU tensors, these are on {logits_BV.device}; use impl='torch'"
    elif truncated:
        reason = "it draws from the whole vocabulary, without top_k and top_p; use impl='torch'"
    else:
        reason = native_library.missing("use impl='torch'")
    if impl == "native" and reason is not None:
        raise RuntimeError(f"impl='native' cannot run: {reason}")
    return "native" if reason is None else "torch"


class _Problem(Structure):
    """FastsdDraw."""

    _fields_ = [
        *((name, c_void_p) for name in ("logits", "uniform")),
        *((name, c_int64) for name in ("rows", "columns", "stride")),
        *((name, c_void_p) for name in ("token", "logprob")),
        ("threads", c_int32),
    ]


def _draw_native(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    logits_BV, uniform_B = logits_BV.contiguous(), uniform_B.double().contiguous()
    rows, columns = logits_BV.shape
    token_B = torch.empty(rows, dtype=torch.int64)
    logprob_B = torch.empty(rows, dtype=torch.float32)
    pointers = (logits_BV.data_ptr(), uniform_B.data_ptr(), rows, columns, columns)
    results = (token_B.data_ptr(), logprob_B.data_ptr(), torch.get_num_threads())
    native_library.call("draw", _Problem(*pointers, *results))
    return token_B, logprob_B


def _draw(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds uniform * total; never a token of zero mass."""
    threshold_B1 = uniform_B.to(mass_BV)[:, None] * mass_BV[:, -1:]
    index_B1 = torch.searchsorted(mass_BV, threshold_B1, right=True)
    last_B1 = torch.searchsorted(mass_BV, mass_BV[:, -1:].contiguous())
    return torch.minimum(index_B1, last_B1)


def _draw_truncated(logits_BV: Tensor, uniform_B: Tensor, top_k: int, top_p: float) -> Tensor:
    if top_k == 1:  # greedy, without sorting the vocabulary; the lowest of equal ids, as below
        return logits_BV.argmax(-1, keepdim=True)
    count = min(top_k, logits_BV.shape[-1]) if top_k > 0 else logits_BV.shape[-1]
    # Stable order: equal logits are kept by token id, whatever the device's sort does.
    sorted_BK, order_BK = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BK = sorted_BK[:, :count].softmax(-1)
    before_BK = probs_BK.cumsum(-1) - probs_BK
    probs_BK = probs_BK.masked_fill(before_BK >= top_p, 0.0)
    return order_BK.gather(-1, _draw(probs_BK.cumsum(-1), uniform_B))


def _validate(logits_BV, uniform_B, temperature, top_k, top_p) -> None:
    if logits_BV.ndim != 2 or logits_BV.dtype != torch.float32:
        raise ValueError(
            f"logits_BV must be fp32 [B, V], got {logits_BV.dtype} {tuple(logits_BV.shape)}"
        )
    if uniform_B.shape != logits_BV.shape[:1]:
        raise ValueError(
            f"uniform_B must hold one number per row, [{logits_BV.shape[0]}], got "
            f"{tuple(uniform_B.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be >= 0 and top_p in (0, 1], got {top_k} and {top_p}")
