"""The C++ loss head against the fp64 reference: every option, ragged shapes, scratch, extremes.

What sweep one keeps depends on the call: with an entropy term, a softcap, an entry clip or top-k it
is fp32 logits, otherwise with bf16 inputs compact fp16 forms. So every option runs with all terms
and "lean", without the entropy term.
Shape suffixes: T rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from loss_head_options import DIVERGENCES, VALUES, evaluate, widened
from native_cases import (
    BF16,
    CASE_IDS,
    CASES,
    DTYPES,
    FP32,
    GRADIENTS,
    budgets,
    check,
    inputs,
    native_sweep,
    without_clip,
)

from fastsd_kernels.testing import (
    BF16_GRADIENT_ERROR,
    FP32_ERROR,
    FP32_ERROR_AT_SCALE_8,
    relative_error,
)

# Both sides of every block: MR = 14 rows, NR = 32 columns, 64 panels a segment, 8 a group.
RAGGED = [
    (1, 1, 1), (13, 3, 2), (14, 1, 31), (15, 33, 32), (29, 17, 33), (1, 64, 65), (14, 5, 257),
    (29, 3, 2047), (13, 15, 2048), (15, 7, 2049), (3, 2049, 129), (29, 40, 4097),
]  # fmt: skip


@pytest.mark.parametrize("terms, options, dtype", native_sweep(dtype=DTYPES))
def test_every_option(terms, options, dtype):
    x = inputs((45, 33, 1031), dtype, terms)
    options = without_clip(options, x)
    # A power of two: scaling a bf16 gradient then is no third rounding.
    exact = evaluate(widened(x), "reference", upstream=-2.0, **options)
    found = evaluate(x, "native", upstream=-2.0, **options)
    check(found, exact, **budgets(x, options))
    for name in GRADIENTS:
        assert found[name].dtype == dtype


def logit_gradient(x: dict, **options) -> torch.Tensor:
    """The fp64 gradient in the logits [T, V]: the reference's, with the identity as head."""
    wide = widened(x)
    head = wide.pop("head_VD")
    bias = wide.pop("bias_V")
    wide["student_TD"] = wide["student_TD"] @ head.T + bias
    if "teacher_TD" in wide:
        wide["teacher_TD"] = wide["teacher_TD"] @ head.T + bias
    wide["head_VD"] = torch.eye(head.shape[0], dtype=torch.float64)
    return evaluate(wide, "reference", **options)["d student_TD"]


@pytest.mark.parametrize("terms", ["all", "lean", "no teacher"])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_ragged_shapes(shape, terms):
    for divergence in DIVERGENCES if terms != "no teacher" else ("forward_kl",):
        options = {"divergence": divergence, "beta": 0.3}
        for dtype in (FP32, BF16):
            x = inputs(shape, dtype, terms, seed=sum(shape))
            exact = evaluate(widened(x), "reference", **options)
            found = evaluate(x, "native", **options)
            few = dtype == BF16 and shape[2] <= 2049
            slope = logit_gradient(x, **options).abs() if few else None
            for name, expected in exact.items():
                limit = bound(name, exact, x, slope, dtype)
                error = torch.linalg.vector_norm(found[name].double() - expected)
                assert float(error) <= limit, (name, dtype, divergence)


def bound(name, exact, x, slope_TV, dtype) -> float:
    """Of the L2 error: the budgets; for few bf16 elements both roundings' worst case, 2^-8 each."""
    norm = float(torch.linalg.vector_norm(exact[name]))
    # Terms that cancel (V = 1, 2) leave the rounding of a row's coefficients, of order 1.
    rest = FP32_ERROR * max(norm, len(x["target_T"]) ** 0.5)
    if name not in GRADIENTS or dtype == FP32:
        summed = dtype == BF16 and name in ("loss", "divergence_T") and "divergence_T" in exact
        return rest + (2**-11 * float(exact["divergence_T"].abs().sum()) if summed else 0)
    if slope_TV is None:
        return BF16_GRADIENT_ERROR * norm
    left = {"d student_TD": x["head_VD"], "d head_VD": x["student_TD"]}.get(name)
    if name == "d student_TD":
        worst = slope_TV @ left.detach().double().abs()
    elif name == "d head_VD":
        worst = slope_TV.T @ left.detach().double().abs()
    else:
        worst = exact[name]
    # 1/2 for the fp16 forms: up to four roundings of 2^-11 each.
    return rest + 2**-8 * (1.5 * float(torch.linalg.vector_norm(worst)) + norm)


@pytest.mark.parametrize("scale, budget", [(1.0, FP32_ERROR), (8.0, FP32_ERROR_AT_SCALE_8)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "shape", [(64, 64, 1999), pytest.param((64, 576, 49152), marks=pytest.mark.slow)], ids=str
)
def test_fp32_error_budget(shape, divergence, scale, budget):
    x = inputs(shape, FP32)
    options = {"divergence": divergence, "logit_scale": scale, "clip": 0.2}
    exact = evaluate(widened(x), "reference", **options)
    check(evaluate(x, "native", **options), exact, budget=budget, gradients=budget)


@pytest.mark.parametrize("target", ["random", "policy"])
@pytest.mark.parametrize("noise", [0.1, None], ids=["near", "unrelated"])
@pytest.mark.parametrize("scale", [8.0, 16.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_peaked_rows_keep_their_bf16_gradients(divergence, scale, noise, target):
    """What fp16 holds must do where a confident row's gradient is a small difference."""
    x = inputs((64, 64, 8000), BF16, "divergence")
    del x["bias_V"]
    student, head = x["student_TD"].detach().double(), x["head_VD"].detach().double()
    if noise is not None:
        x["teacher_TD"] = (student + noise * x["teacher_TD"].double()).to(BF16)
    if target == "policy":
        generator = torch.Generator().manual_seed(0)
        p_TV = (scale * student @ head.T).softmax(-1)
        x["target_T"] = torch.multinomial(p_TV, 1, generator=generator)[:, 0]
    options = {"divergence": divergence, "logit_scale": scale}
    exact, found = evaluate(widened(x), "reference", **options), evaluate(x, "native", **options)
    for name in ("d student_TD", "d head_VD"):
        assert relative_error(found[name], exact[name]) <= BF16_GRADIENT_ERROR, name
    # KLs come from fp32 sums. A JSD's summands are rounded by up to 3 x 2^-11, to either side.
    bound = 2**-11 if divergence == "jsd" else 2**-16
    assert relative_error(found["loss"], exact["loss"]) <= bound


def jsd_rounding(x: dict, beta: float, scale: float) -> torch.Tensor:
    """The standard deviation of a row's JSD if base and gap of each summand are rounded to fp16.

    k = base f(gap), base p_S or p_T; gap is stored less that of a likely entry, here taken at the
    target, which is no better. Each rounding has unit roundoff 2^-11, so at most 2^-11 / sqrt(3)
    rms.
    """
    z_s, z_t = (
        scale * (x[name].detach().double() @ x["head_VD"].detach().double().T)
        for name in ("student_TD", "teacher_TD")
    )
    l_s, l_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    p_s, p_t = l_s.exp().requires_grad_(), l_t.exp().requires_grad_()
    m = (1 - beta) * p_s + beta * p_t
    k = beta * p_t * (p_t / m).log() + (1 - beta) * p_s * (p_s / m).log()
    slopes = torch.autograd.grad(k.sum(), (p_s, p_t))
    slope = torch.maximum((p_s * slopes[0]).abs(), (p_t * slopes[1]).abs()).detach()
    raw = z_s - z_t
    stored = raw - raw.gather(1, x["target_T"][:, None])
    return 2**-11 / 3**0.5 * (k.detach() ** 2 + (slope * stored) ** 2).sum(-1).sqrt()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_value_of_a_compact_jsd(scale):
    """Five standard deviations of its roundings, and no bias: they average out over rows."""
    x = inputs((200, 64, 1999), BF16, "divergence")
    del x["bias_V"]
    options = {"divergence": "jsd", "beta": 0.3, "logit_scale": scale}
    exact = evaluate(widened(x), "reference", **options)["divergence_T"]
    error_T = evaluate(x, "native", **options)["divergence_T"].double() - exact
    deviation_T = jsd_rounding(x, 0.3, scale)
    assert bool((error_T.abs() <= 5 * deviation_T + 1e-6 * exact).all())
    assert abs(float(error_T.sum())) <= 5 * float(deviation_T.square().sum().sqrt()) + 1e-4


@pytest.mark.parametrize("terms, options", CASES, ids=CASE_IDS)
def test_equal_streams_give_exactly_zero(terms, options):
    if terms in ("policy", "no teacher"):
        return
    for dtype in (FP32, BF16):
        for scale, shape in ((1.0, (33, 32, 500)), (4.0, (16, 8, 4097))):
            x = inputs(shape, dtype, "divergence")
            x["teacher_TD"] = x["student_TD"].detach().clone()
            chosen = {k: v for k, v in options.items() if k != "clip"} | {"logit_scale": scale}
            found = evaluate(x, "native", **chosen)
            for name in ("loss", "divergence_T", *GRADIENTS):
                assert not found[name].any(), (name, dtype, shape)


@pytest.mark.parametrize(
    "terms, options, scale, dtype", native_sweep(scale=[1e4, 30.0], dtype=DTYPES)
)
def test_extreme_logits_stay_finite(terms, options, scale, dtype):
    x = inputs((16, 4, 63), dtype, terms)
    options = without_clip(options, x)
    with torch.no_grad():
        for name in ("student_TD", "teacher_TD"):
            if name in x:
                x[name].div_(x[name].norm(dim=-1, keepdim=True)).mul_(scale)
        x["head_VD"].div_(x["head_VD"].norm(dim=-1, keepdim=True))
    if "old_logprob_T" in x:
        x["old_logprob_T"] = x["old_logprob_T"] * 1e3
    exact, found = (
        evaluate(widened(x), "reference", **options),
        evaluate(x, "native", **options),
    )
    for name, value in found.items():
        assert value.isfinite().all(), name
    # z carries an absolute error of 1e4 u D^.5 = 2e-3; a compact JSD its fp16 gaps, 2^-11 of each.
    compact = dtype == BF16 and options.get("divergence") == "jsd"
    rtol = 1e-2 if compact else 1e-3 if scale > 100 else 1e-4
    torch.testing.assert_close(found["loss"].double(), exact["loss"], rtol=rtol, atol=1e-3)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_one_certain_token(dtype):
    """A row whose whole mass is on one entry: its log-probability is 0, its entropy too."""
    x = inputs((6, 8, 70), dtype, "lean")
    with torch.no_grad():
        x["head_VD"].zero_()[33] = 1
        x["student_TD"].fill_(64.0)
        x["bias_V"].zero_()
    x["target_T"].fill_(33)
    for divergence in DIVERGENCES:
        exact = evaluate(widened(x), "reference", divergence=divergence)
        found = evaluate(x, "native", divergence=divergence)
        assert not found["student_logprob_T"].any()
        assert float(found["entropy_T"].max()) <= 1e-30  # e^-87 stands in for less
        # Logits of 512 in fp32; a compact JSD rounds their gaps to 11 bits.
        rtol = 512 * 2**-11 if dtype == BF16 and divergence == "jsd" else FP32_ERROR
        for name in VALUES:
            torch.testing.assert_close(found[name].double(), exact[name], rtol=rtol, atol=1e-4)


@pytest.mark.parametrize(
    "terms, options, where", native_sweep(where=["student_TD", "teacher_TD", "head_VD"])
)
def test_not_a_number_stays_visible(where, terms, options):
    """A bad number in must come out, or a guard against non-finite gradients has nothing to see."""
    for dtype in (FP32, BF16):
        x = inputs((9, 12, 300), dtype, terms)
        if where not in x:
            continue
        with torch.no_grad():
            x[where][5, 7] = torch.nan
        found = evaluate(x, "native", **without_clip(options, x))
        assert found["loss"].isnan() and found["d student_TD"][5].isnan().all(), dtype
        assert found["entropy_T"][5].isnan() == (where != "teacher_TD")
        if where != "head_VD":
            assert not found["d student_TD"][torch.arange(9) != 5].isnan().any(), dtype
