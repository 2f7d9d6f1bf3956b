"""The chunked implementation against the fp64 reference: values, gradients, extremes, work."""

from __future__ import annotations

import pytest
import torch
from loss_head_options import DIVERGENCES, OPTIONS, VALUES, evaluate, widened

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.loss_head import chunked
from fastsd_kernels.testing import (
    BF16_GRADIENT_ERROR,
    FP32_ERROR,
    FP32_ERROR_AT_SCALE_8,
    WorkMeter,
    loss_head_inputs,
    poisoned_empty,
    relative_error,
)

SHAPES = [(1, 5, 63), (63, 16, 500), (37, 16, 63), (5, 3, 1), (500, 8, 63)]
# fp64 agreement: sums of up to T V terms in another order, u = 1.1e-16.
FP64_ERROR = 1e-12


@pytest.fixture
def tiny_chunks(monkeypatch):
    """A few rows per chunk, fewer per tile."""

    def force(vocabulary: int, rows: int = 5, tile_rows: int = 2):
        monkeypatch.setitem(chunked.SCRATCH_BYTES, "cpu", rows * 2 * vocabulary * 8)
        monkeypatch.setitem(chunked.TILE_LOGITS, "cpu", tile_rows * vocabulary)

    return force


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fp64_is_the_reference(options, shape, tiny_chunks):
    x = loss_head_inputs(*shape, seed=sum(shape))
    if options.get("top_k"):
        options = {**options, "top_k": min(options["top_k"], shape[2])}
    exact = evaluate(x, "reference", upstream=-1.7, **options)
    tiny_chunks(shape[2])
    found = evaluate(x, "chunked", upstream=-1.7, **options)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if shape[2] == 1 and name.startswith("d "):
            assert float((found[name] - value).abs().max()) <= 1e-12, name
        else:
            assert relative_error(found[name], value) <= FP64_ERROR, name


@pytest.mark.parametrize("scale, budget", [(1.0, FP32_ERROR), (8.0, FP32_ERROR_AT_SCALE_8)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_error_budget(divergence, scale, budget, tiny_chunks):
    x = loss_head_inputs(96, 64, 1999, torch.float32)
    exact = evaluate(widened(x), "reference", divergence=divergence, logit_scale=scale, clip=0.2)
    tiny_chunks(1999, rows=40, tile_rows=7)
    found = evaluate(x, "chunked", divergence=divergence, logit_scale=scale, clip=0.2)
    for name in ("loss", "d student_TD", "d head_VD", "d bias_V"):
        assert relative_error(found[name], exact[name]) <= budget, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_error_budget(divergence, tiny_chunks):
    x = loss_head_inputs(96, 64, 1999, torch.bfloat16)
    exact = evaluate(widened(x), "reference", divergence=divergence)
    tiny_chunks(1999, rows=40, tile_rows=7)
    found = evaluate(x, "chunked", divergence=divergence)
    assert relative_error(found["loss"], exact["loss"]) <= FP32_ERROR
    for name in ("d student_TD", "d head_VD", "d bias_V"):
        assert found[name].dtype == torch.bfloat16
        assert relative_error(found[name], exact[name]) <= BF16_GRADIENT_ERROR, name


def test_fp16_runs_in_fp32():
    x = loss_head_inputs(20, 16, 63, torch.float16)
    found, exact = evaluate(x, "chunked"), evaluate(widened(x), "reference")
    assert relative_error(found["loss"], exact["loss"]) <= FP32_ERROR
    # One rounding of the result to fp16: 2^-11, and 2^-12 absolute where it is subnormal.
    assert relative_error(found["d student_TD"], exact["d student_TD"]) <= 2**-11


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_streams_give_exactly_zero(options, tiny_chunks):
    for dtype in (torch.float32, torch.bfloat16):
        x = loss_head_inputs(63, 32, 500, dtype)
        tiny_chunks(500, rows=20)
        hidden = x["student_TD"].detach().clone().requires_grad_()
        head, bias = x["head_VD"], x["bias_V"]
        options = {k: v for k, v in options.items() if k != "clip"}
        out = fused_linear_loss(
            hidden, head, x["target_T"], teacher_TD=hidden.detach().clone(), bias_V=bias,
            impl="chunked", **options,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.item() == 0.0 and not out.divergence_T.any()
        for name, leaf in (("student", hidden), ("head", head), ("bias", bias)):
            # With a clip an entry of KL(S||T) at 0 is below it, so nothing is held back.
            assert not leaf.grad.any(), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [1e4, 30.0])
def test_extreme_logits_stay_finite(options, scale):
    x = loss_head_inputs(8, 4, 63, torch.float32)
    with torch.no_grad():
        for name in ("student_TD", "teacher_TD"):
            x[name].div_(x[name].norm(dim=-1, keepdim=True)).mul_(scale)
        x["head_VD"].div_(x["head_VD"].norm(dim=-1, keepdim=True))
    x["old_logprob_T"] = x["old_logprob_T"] * 1e3
    found, exact = evaluate(x, "chunked", **options), evaluate(widened(x), "reference", **options)
    for name, value in found.items():
        assert value.isfinite().all(), name
    # z carries an absolute error of 1e4 u D^.5 = 2e-3 here, so the loss is only close.
    torch.testing.assert_close(
        found["loss"].double(), exact["loss"], rtol=1e-3 if scale > 100 else 1e-4, atol=1e-3
    )


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_nothing_counts(impl, rows):
    x = loss_head_inputs(rows, 8, 20, torch.float32)
    with torch.no_grad():
        x["student_TD"].fill_(torch.nan)
    for name in ("divergence_weight_T", "policy_weight_T", "entropy_weight_T"):
        x[name].zero_()
    x["old_logprob_T"].fill_(torch.nan)
    x["target_T"].fill_(-100)
    found = evaluate(x, impl, upstream=3.0, clip=0.2, divergence="jsd", top_k=3)
    for name, value in found.items():
        assert not value.any(), name
    assert found["d student_TD"].shape == (rows, 8) and found["divergence_T"].shape == (rows,)


def test_results_do_not_depend_on_chunks(tiny_chunks):
    x = loss_head_inputs(131, 32, 500, torch.float32)
    whole = evaluate(x, "chunked", divergence="jsd", clip=0.2)
    for rows, tile in ((1, 1), (7, 3), (130, 131)):
        tiny_chunks(500, rows, tile)
        parts = evaluate(x, "chunked", divergence="jsd", clip=0.2)
        for name, value in whole.items():
            assert relative_error(parts[name], value) <= FP32_ERROR, (name, rows)


def test_statistics_are_those_of_the_loss(tiny_chunks):
    x = loss_head_inputs(40, 16, 63, torch.float32)
    mask_T = torch.rand(40) < 0.6
    common = {k: x[k] for k in ("student_TD", "head_VD", "target_T", "teacher_TD", "bias_V")}
    for options in ({"divergence": "reverse_kl"}, {"top_k": 5}, {"entry_clip": 0.01}):
        loss = fused_linear_loss(**common, divergence_weight_T=mask_T, impl="chunked", **options)
        for impl in ("chunked", "reference"):
            found = fused_linear_statistics(**common, mask_T=mask_T, **options, impl=impl)
            assert found.impl == impl and not found.divergence_T.requires_grad
            for name in (*VALUES[1:], *(["entry_clipped_T"] if "entry_clip" in options else [])):
                value = getattr(found, name)
                assert relative_error(value, getattr(loss, name)) <= FP32_ERROR, name
                assert not value[~mask_T].any()


def test_four_gemms_and_no_full_logits(monkeypatch):
    rows, width, vocabulary, chunk = 96, 32, 500, 24
    monkeypatch.setitem(chunked.SCRATCH_BYTES, "cpu", chunk * 2 * vocabulary * 4)
    gemm = 2 * rows * width * vocabulary
    for dtype in (torch.float32, torch.bfloat16):
        for frozen, train, gemms in ((False, True, 4), (True, True, 3), (False, False, 2)):
            x = loss_head_inputs(rows, width, vocabulary, dtype)
            x["head_VD"].requires_grad_(not frozen)
            x["bias_V"].requires_grad_(not frozen)
            with WorkMeter() as meter, torch.set_grad_enabled(train):
                loss = fused_linear_loss(**x, divergence="jsd", impl="chunked").loss
                if train:
                    loss.backward()
            assert meter.product_flop == gemms * gemm, (dtype, frozen, train)
            assert meter.products == gemms * rows // chunk
            assert meter.largest_bytes <= 4 * max(chunk * vocabulary, vocabulary * width)


def test_masked_rows_cost_no_gemm():
    x = loss_head_inputs(50, 8, 63, torch.float32)
    x["divergence_weight_T"] = (torch.arange(50) % 5 == 0).float()
    for name in ("policy_weight_T", "old_logprob_T", "entropy_weight_T"):
        del x[name]
    with WorkMeter() as meter:
        fused_linear_loss(**x, impl="chunked").loss.backward()
    assert meter.product_flop == 4 * 2 * 10 * 8 * 63


def test_reads_no_unwritten_memory(tiny_chunks):
    x = loss_head_inputs(33, 16, 63, torch.float32)
    tiny_chunks(63)
    for options in OPTIONS:
        exact = evaluate(x, "chunked", **options)
        with poisoned_empty():
            found = evaluate(x, "chunked", **options)
        for name, value in exact.items():
            assert torch.equal(found[name], value), (name, options)


def test_teacher_with_its_own_wider_head():
    x = loss_head_inputs(20, 16, 63)
    wide = loss_head_inputs(20, 24, 63, seed=5)
    x["teacher_TD"], x["teacher_head_VD"] = wide["student_TD"], wide["head_VD"]
    exact, found = evaluate(x, "reference"), evaluate(x, "chunked")
    for name, value in exact.items():
        assert relative_error(found[name], value) <= FP64_ERROR, name
    assert wide["student_TD"].grad is None and wide["head_VD"].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_head_named_twice_is_one_head(dtype):
    x = loss_head_inputs(20, 16, 63, dtype)
    once = evaluate(x, "chunked")
    with WorkMeter() as meter:
        out = fused_linear_loss(**x, teacher_head_VD=x["head_VD"].detach(), impl="chunked")
    assert torch.equal(out.loss, once["loss"]) and torch.equal(
        out.divergence_T, once["divergence_T"]
    )
    out.loss.backward()
    assert torch.equal(x["head_VD"].grad, once["d head_VD"]) and meter.products == 4


def test_strided_inputs():
    x = loss_head_inputs(20, 16, 63)
    exact = evaluate(x, "reference")
    for name in ("student_TD", "teacher_TD", "head_VD"):
        x[name] = x[name].detach().T.contiguous().T.requires_grad_(name != "teacher_TD")
    x["policy_weight_T"] = x["policy_weight_T"].repeat_interleave(2)[::2]
    found = evaluate(x, "chunked")
    for name, value in exact.items():
        assert relative_error(found[name], value) <= FP64_ERROR, name


def test_tied_head_used_twice():
    """A head that is also the embedding: its two gradients add up."""
    x = loss_head_inputs(20, 16, 63)
    embedding_VD = x.pop("head_VD")
    gradients = []
    for impl in ("reference", "chunked"):
        x["student_TD"] = torch.tanh(embedding_VD[x["target_T"]])
        loss = fused_linear_loss(**x, head_VD=embedding_VD, impl=impl).loss
        gradients.append(torch.autograd.grad(loss, embedding_VD)[0])
    assert relative_error(gradients[1], gradients[0]) <= FP64_ERROR


def test_backward_twice_and_under_autocast():
    x = loss_head_inputs(20, 16, 63, torch.float32)
    out = fused_linear_loss(**x, impl="chunked")
    first = torch.autograd.grad(out.loss, x["student_TD"], retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(2 * out.loss, x["student_TD"])[0], 2 * first)
    x["student_TD"] = x["student_TD"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused_linear_loss(**x, impl="chunked").loss.backward()
    assert x["head_VD"].grad.dtype == torch.float32
    assert x["student_TD"].grad.dtype == torch.bfloat16


def test_process_settings_are_left_alone():
    before = torch.backends.mkldnn.matmul.fp32_precision
    evaluate(loss_head_inputs(4, 8, 20, torch.bfloat16), "chunked")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"
