"""Elementary functions of the Triton row kernels to fp32 rounding, and the scaling of logits.

libdevice's are missing under the interpreter and differ between vendors, so these are written out:
a series where the plain formula would cancel, the plain formula elsewhere. Each maps 0 to exactly
0, which is what makes equal streams give exactly zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A maximum starts here: finite, so that differences of maxima are. An absent entry lies far enough
# below that e^(absent - maximum) is exactly 0, also against a maximum of no entries.
LOWEST = tl.constexpr(-1.0e30)
ABSENT = tl.constexpr(-2.0e30)


@triton.jit
def tanh(x):
    """Minimax odd polynomial (Cephes) below 0.55; 1 - 2 / (e^2x + 1) cancels there."""
    square = x * x
    series = 2.06390887954e-2 + square * -5.70498872745e-3
    series = 1.33314422036e-1 + square * (-5.37397155531e-2 + square * series)
    near = x + x * (square * (-3.33332819422e-1 + square * series))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x):
    """Taylor series below 0.5: the first term left out is x^8 / 9! < 2e-8 of the result."""
    series = 1.0 + x * (1.0 / 7.0) * (1.0 + x * (1.0 / 8.0))
    series = 1.0 + x * (1.0 / 5.0) * (1.0 + x * (1.0 / 6.0) * series)
    series = 1.0 + x * (1.0 / 3.0) * (1.0 + x * (1.0 / 4.0) * series)
    return tl.where(tl.abs(x) < 0.5, x * (1.0 + x * 0.5 * series), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """x > -1. 2 atanh(x / (2 + x)) below 0.5: the first term left out is 3^-14 / 15 < 2e-8."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = 1.0 / 9.0 + square * (1.0 / 11.0 + square * (1.0 / 13.0))
    series = 1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0 + square * series))
    near = 2.0 * ratio * (1.0 + square * series)
    return tl.where(tl.abs(x) < 0.5, near, tl.log(1.0 + x))


@triton.jit
def scaled(x, inner, outer, SOFTCAP: tl.constexpr):
    """z = softcap(scale x) / temperature; an x of -inf stands for no entry at all.

    inner = scale / temperature, or scale / softcap and outer = softcap / temperature.
    """
    z = x * inner
    if SOFTCAP:
        z = tanh(z) * outer
    return tl.where(x == float("-inf"), ABSENT, z)


@triton.jit
def log_ratio(most_s, mass_s, most_t, mass_t):
    """LSE_s - LSE_t without the rounding of either."""
    return (most_s - most_t) + tl.log(mass_s / mass_t)
