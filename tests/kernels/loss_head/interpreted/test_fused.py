"""impl="triton" under Triton's interpreter (TRITON_INTERPRET=1): every option against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_interpreter import MemoryTracer, require_interpreter

require_interpreter()

from fused_cases import (  # noqa: E402, F401
    CLIPPED,
    LEAVES,
    STATISTICS,
    check,
    many_small_blocks,
    run,
    widened,
)

from fastsd_kernels import fused_linear_loss, fused_linear_statistics  # noqa: E402
from fastsd_kernels.loss_head.contract import Inputs, Options  # noqa: E402
from fastsd_kernels.loss_head.triton import fused  # noqa: E402
from fastsd_kernels.testing import (  # noqa: E402
    BF16_GRADIENT_ERROR,
    FP32_ERROR,
    FP32_ERROR_AT_SCALE_8,
    WorkMeter,
    loss_head_inputs,
    poisoned_empty,
    relative_error,
)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "sampled_token")


def every_option():
    top_ks = (None, (7, True), (7, False))
    for divergence, top_k, clip in itertools.product(DIVERGENCES[:3], top_ks, (None, 0.05)):
        options = {"divergence": divergence, "beta": 0.3, "entry_clip": clip}
        yield options | ({"top_k": top_k[0], "tail": top_k[1]} if top_k else {})
    yield {"divergence": "sampled_token"}
    yield {"divergence": "jsd", "beta": 0.0}
    yield {"divergence": "jsd", "beta": 1.0}
    yield {"divergence": "jsd", "beta": 0.97, "logit_scale": 0.3, "clip": 0.2}
    yield {"softcap": 2.0, "temperature": 1.3, "logit_scale": 0.7, "clip": 0.2}
    yield {"softcap": 2.0, "divergence": "jsd", "top_k": 5, "entry_clip": 0.02}
    yield {"temperature": 0.6, "clip": 0.2, "divergence": "reverse_kl"}


OPTIONS = list(every_option())
BF16_OPTIONS = [{"divergence": d} for d in DIVERGENCES]
BF16_OPTIONS += [{"top_k": 5, "tail": tail} for tail in (True, False)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fp32_matches_fp64(options):
    check(loss_head_inputs(5, 16, 200, torch.float32), FP32_ERROR, FP32_ERROR, **options)


@pytest.mark.parametrize("options", BF16_OPTIONS, ids=str)
def test_bf16_matches_fp64(options):
    """Enough rows of like size that roundings average out; other options are fp32 arithmetic."""
    x = loss_head_inputs(32, 16, 120, torch.bfloat16, seed=1)
    del x["old_logprob_T"]
    check(x, FP32_ERROR, BF16_GRADIENT_ERROR, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_at_logit_scale_8(divergence):
    x = loss_head_inputs(12, 32, 500, torch.float32)
    budget = FP32_ERROR_AT_SCALE_8
    check(x, budget, budget, divergence=divergence, logit_scale=8.0, clip=0.2)


@pytest.mark.parametrize("shape", [(1, 5, 63), (4, 8, 128), (5, 3, 129), (17, 16, 65)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ragged_shapes(divergence, shape):
    x = loss_head_inputs(*shape, torch.float32, seed=sum(shape))
    check(x, FP32_ERROR, FP32_ERROR, divergence=divergence, clip=0.2)


def test_one_vocabulary_entry():
    x = loss_head_inputs(3, 4, 1, torch.float32)
    for name, value in run(x, divergence="jsd").items():
        if name != "loss":
            assert not value.any(), name


def test_fp16_runs_in_fp32():
    x = loss_head_inputs(9, 16, 200, torch.float16)
    # One rounding of the result to fp16: 2^-11.
    check(x, FP32_ERROR, 2**-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_come_and_go(dtype):
    """No teacher, no bias, single terms, no weights, a teacher with a wider head of its own."""
    rows = 5 if dtype == torch.float32 else 16
    x = loss_head_inputs(rows, 16, 100, dtype)
    # Few large rows can set a single term's gradient: two roundings at their worst.
    budgets = (FP32_ERROR, FP32_ERROR if dtype == torch.float32 else 2 * 2**-9)
    terms = ("divergence_weight_T", "policy_weight_T", "old_logprob_T", "entropy_weight_T")
    bare = {k: v for k, v in x.items() if k not in terms}
    alone = {k: v for k, v in bare.items() if k != "teacher_TD"}
    policy = {k: x[k] for k in ("policy_weight_T", "old_logprob_T")}
    check(bare, *budgets)
    check(bare | policy, *budgets, divergence="jsd")
    check(bare | policy, *budgets, top_k=4)
    check(bare | {"entropy_weight_T": x["entropy_weight_T"]}, *budgets, top_k=4, tail=False)
    check(alone | policy, *budgets, clip=0.2)
    check(alone | {"policy_weight_T": x["policy_weight_T"]}, *budgets)
    check(alone | {"entropy_weight_T": x["entropy_weight_T"]}, *budgets)
    del bare["bias_V"]
    wide = loss_head_inputs(rows, 24, 100, dtype, seed=5)
    own = {"teacher_TD": wide["student_TD"], "teacher_head_VD": wide["head_VD"]}
    for options in ({"divergence": "reverse_kl"}, {"divergence": "jsd"}, {"top_k": 9}):
        check(bare | own, *budgets, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_streams_give_exactly_zero(options, dtype):
    x = loss_head_inputs(3, 16, 200, dtype)
    hidden = x["student_TD"].detach()
    given = {k: x[k] for k in ("head_VD", "target_T", "bias_V")}
    options = {k: v for k, v in options.items() if k != "clip"}
    found = run({"student_TD": hidden, "teacher_TD": hidden.clone(), **given}, **options)
    for name in ("loss", "divergence_T", "d student_TD", "d head_VD", "d bias_V"):
        assert not found[name].any(), name


@pytest.mark.parametrize("scale", [1e4, 30.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(divergence, scale):
    x = loss_head_inputs(9, 16, 200, torch.float32)
    with torch.no_grad():
        x["student_TD"] = x["student_TD"] * scale
        x["teacher_TD"] = x["teacher_TD"] * scale
    for name, value in run(x, divergence=divergence, clip=0.2).items():
        assert value.isfinite().all(), name


def test_a_nan_row_is_not_hidden():
    x = loss_head_inputs(6, 8, 200, torch.float32)
    x["student_TD"] = x["student_TD"].detach()
    x["student_TD"][2] = torch.nan
    found = run(x, clip=0.2, divergence="jsd")
    assert found["loss"].isnan() and found["d student_TD"][2].isnan().all()
    others = torch.arange(6) != 2
    assert found["d student_TD"][others].isfinite().all()
    assert found["divergence_T"].isnan().tolist() == (~others).tolist()


@pytest.mark.parametrize("options", [{}, {"divergence": "jsd"}, {"top_k": 5}], ids=str)
def test_chunks_change_rounding_only(options, monkeypatch):
    x = loss_head_inputs(35, 16, 100, torch.float32)
    whole = run(x, **options)
    monkeypatch.setattr(fused, "SCRATCH_BYTES", 17 * 8 * 128)
    with WorkMeter() as meter:
        parts = run(x, **options)
    assert meter.products == 3 * 3  # chunks of 16, 16 and 3 rows: logits, d h, d W
    for name, value in whole.items():
        assert relative_error(parts[name], value) <= FP32_ERROR, name


def test_four_products(monkeypatch):
    rows, width, vocabulary = 32, 8, 120
    monkeypatch.setattr(fused, "SCRATCH_BYTES", 16 * 10 * 128)
    product = 2 * rows * width * vocabulary
    for dtype in (torch.float32, torch.bfloat16):
        for frozen, train, products in ((False, True, 4), (True, True, 3), (False, False, 2)):
            x = loss_head_inputs(rows, width, vocabulary, dtype)
            x["head_VD"].requires_grad_(not frozen)
            x["bias_V"].requires_grad_(not frozen)
            with WorkMeter() as meter, torch.set_grad_enabled(train):
                loss = fused_linear_loss(**x, impl="triton").loss
                if train:
                    loss.backward()
            assert meter.product_flop == products * product, (dtype, frozen, train)
            assert meter.largest_bytes <= 4 * 128 * 2 * 16


def test_frozen_inputs_get_no_gradient():
    x = loss_head_inputs(9, 16, 200, torch.float32)
    full = run(x)
    for name in LEAVES:
        leaves = {k: x[k].detach().clone().requires_grad_(k == name) for k in LEAVES}
        fused_linear_loss(**{**x, **leaves}, impl="triton").loss.backward()
        assert torch.equal(leaves[name].grad, full[f"d {name}"])
        assert all(leaf.grad is None for k, leaf in leaves.items() if k != name)


def test_no_rows():
    found = run(loss_head_inputs(0, 8, 20, torch.float32), divergence="jsd", clip=0.2)
    assert found["loss"] == 0 and found["d student_TD"].shape == (0, 8)
    assert not found["d head_VD"].any()


def test_reads_no_unwritten_memory():
    x = loss_head_inputs(3, 16, 200, torch.float32)
    for options in BF16_OPTIONS + [{"divergence": "jsd", "entry_clip": 0.02}]:
        exact = run(x, **options)
        with poisoned_empty():
            found = run(x, **options)
        for name, value in exact.items():
            assert torch.equal(found[name], value), (name, options)


def test_strided_inputs():
    x = loss_head_inputs(9, 16, 200, torch.float32)
    plain = run(x, divergence="jsd")
    for name in ("student_TD", "teacher_TD", "head_VD"):
        x[name] = x[name].detach().T.contiguous().T
    x["policy_weight_T"] = x["policy_weight_T"].repeat_interleave(2)[::2]
    x["bias_V"] = x["bias_V"].detach().repeat_interleave(2)[::2]
    for name, value in run(x, divergence="jsd").items():
        assert relative_error(value, plain[name]) <= FP32_ERROR, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", ["none", "shared head", "own head"])
def test_statistics(dtype, teacher):
    """By the tile, or through the scratch for options that need the logits twice."""
    x, wide = loss_head_inputs(5, 16, 200, dtype), loss_head_inputs(5, 24, 200, dtype, seed=5)
    given = {k: x[k].detach() for k in ("student_TD", "head_VD", "target_T", "bias_V")}
    options = [{"divergence": d, "softcap": 5.0} for d in DIVERGENCES]
    if teacher == "shared head":
        given["teacher_TD"] = x["teacher_TD"]
        options += [{"top_k": 5, "tail": tail} for tail in (True, False)] + [{"entry_clip": 0.01}]
    elif teacher == "own head":
        given["teacher_TD"], given["teacher_head_VD"] = wide["student_TD"], wide["head_VD"]
    for option in options:
        found = fused_linear_statistics(**given, **option, impl="triton")
        exact = fused_linear_statistics(**widened(given), **option, impl="reference")
        for name in (*STATISTICS, *CLIPPED):
            value = getattr(exact, name)
            assert (value is None) == (getattr(found, name) is None), name
            if value is not None:
                assert relative_error(getattr(found, name), value) <= FP32_ERROR, (name, option)


def test_statistics_keep_no_logits():
    x = loss_head_inputs(64, 16, 700, torch.float32)
    given = {k: x[k].detach() for k in ("student_TD", "head_VD", "target_T", "teacher_TD")}
    with WorkMeter() as meter:
        fused_linear_statistics(**given, impl="triton")
    assert meter.products == 0 and meter.largest_bytes <= x["head_VD"].nbytes


@pytest.mark.parametrize(
    "dtype, options, expected",
    [
        (torch.bfloat16, {"divergence": "forward_kl"}, 30),
        (torch.bfloat16, {"divergence": "reverse_kl"}, 30),
        (torch.bfloat16, {"divergence": "sampled_token"}, 26),
        (torch.bfloat16, {"divergence": "jsd"}, 38),
        (torch.float32, {"divergence": "reverse_kl"}, 36),
    ],
    ids=str,
)
def test_bytes_per_logit(dtype, options, expected):
    """What the kernels really load and store, and each GEMM its logits or g once."""
    rows, width, vocabulary = 1, 4, 20_000
    x = loss_head_inputs(rows, width, vocabulary, dtype)
    names = ("student_TD", "head_VD", "target_T", "teacher_TD", "divergence_weight_T")
    inputs, wanted = Inputs(**{k: x[k].detach() for k in names}), (True, True, False)
    assert fused.bytes_per_logit(inputs, Options(**options), wanted) == expected
    tracer = MemoryTracer()
    with tracer.recording():
        fused.evaluate(inputs, Options(**options), wanted)
    g_bytes = 2 if dtype == torch.bfloat16 else 4
    by_products = 2 * 4 + 2 * g_bytes
    by_kernels = (tracer.loaded + tracer.stored) / (rows * vocabulary)
    assert by_kernels == pytest.approx(expected - by_products, rel=0.02)
