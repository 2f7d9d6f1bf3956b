"""impl="triton" on a CUDA device: everything against fp64 on the CPU. `make gpu-check` runs these.

They have not run yet: no machine so far had a GPU. Under the interpreter the same code is held to
the same budgets in interpreted/test_fused.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.testing import (
    BF16_GRADIENT_ERROR,
    FP32_ERROR,
    FP32_ERROR_AT_SCALE_8,
    loss_head_inputs,
    relative_error,
)

pytestmark = pytest.mark.gpu

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "sampled_token")
STATISTICS = ("divergence_T", "student_logprob_T", "teacher_logprob_T", "entropy_T")
CLIPPED = ("policy_clipped_T", "entry_clipped_T")
LEAVES = ("student_TD", "head_VD", "bias_V")
COMMON = ("student_TD", "head_VD", "target_T", "teacher_TD", "bias_V")
SHAPE = (301, 64, 4999)


def every_option():
    top_ks = (None, (20, True), (20, False))
    for divergence, top_k, clip in itertools.product(DIVERGENCES[:3], top_ks, (None, 0.05)):
        options = {"divergence": divergence, "beta": 0.3, "entry_clip": clip}
        yield options | ({"top_k": top_k[0], "tail": top_k[1]} if top_k else {})
    yield {"divergence": "sampled_token"}
    yield {"divergence": "jsd", "beta": 0.97}
    yield {"softcap": 2.0, "temperature": 1.3, "logit_scale": 0.7, "clip": 0.2}
    yield {"temperature": 0.6, "clip": 0.2, "divergence": "reverse_kl"}


OPTIONS = list(every_option())


@pytest.fixture(autouse=True)
def full_precision():
    """The budgets are those of IEEE fp32 products."""
    assert not torch.backends.cuda.matmul.allow_tf32


def on(device: str, x: dict) -> dict:
    return {k: v.detach().to(device) for k, v in x.items()}


def widened(x: dict) -> dict:
    return {k: v.detach().double() if v.is_floating_point() else v for k, v in x.items()}


def run(x: dict, impl: str = "triton", **options) -> dict[str, torch.Tensor]:
    """Loss, statistics and gradients of one call, where x is."""
    leaves = {k: x[k].detach().clone().requires_grad_() for k in LEAVES if k in x}
    out = fused_linear_loss(**{**x, **leaves}, **options, impl=impl)
    assert out.impl == impl
    gradients = torch.autograd.grad(out.loss, list(leaves.values()))
    found = {"loss": out.loss} | {name: getattr(out, name) for name in (*STATISTICS, *CLIPPED)}
    found |= {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items() if value is not None}


def check(x: dict, budget: float, gradient_budget: float, **options) -> None:
    found, exact = run(on("cuda", x), **options), run(widened(x), "reference", **options)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        here = found[name].cpu()
        if name in CLIPPED:
            # An entry at the clip to within rounding may fall on either side of it.
            assert int((here != value).sum()) <= 2, name
        elif name != "loss":
            limit = gradient_budget if name.startswith("d ") else budget
            assert relative_error(here, value) <= limit, name
    terms = exact["divergence_T"] * x["divergence_weight_T"]
    scale = float(terms.abs().sum() + exact["loss"].abs())
    assert abs(float(found["loss"]) - float(exact["loss"])) <= budget * scale


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fp32(options):
    check(loss_head_inputs(*SHAPE, torch.float32), FP32_ERROR, FP32_ERROR, **options)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_bf16(options):
    x = loss_head_inputs(*SHAPE, torch.bfloat16, seed=1)
    del x["old_logprob_T"]
    options = {k: v for k, v in options.items() if k != "clip"}
    check(x, FP32_ERROR, BF16_GRADIENT_ERROR, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_at_logit_scale_8(divergence):
    x, budget = loss_head_inputs(*SHAPE, torch.float32), FP32_ERROR_AT_SCALE_8
    check(x, budget, budget, divergence=divergence, logit_scale=8.0)


def test_the_widest_vocabulary():
    x = loss_head_inputs(5, 32, 262_144, torch.float32)
    for divergence in ("reverse_kl", "jsd"):
        check(x, FP32_ERROR, FP32_ERROR, divergence=divergence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_statistics(divergence, dtype):
    x = loss_head_inputs(*SHAPE, dtype)
    wide = loss_head_inputs(301, 96, 4999, dtype, seed=5)
    own = {"teacher_TD": wide["student_TD"], "teacher_head_VD": wide["head_VD"]}
    for given in ({k: x[k] for k in COMMON}, {k: x[k] for k in COMMON} | own):
        found = fused_linear_statistics(**on("cuda", given), divergence=divergence, impl="triton")
        exact = fused_linear_statistics(**widened(given), divergence=divergence, impl="reference")
        for name in STATISTICS:
            here = getattr(found, name).cpu()
            assert relative_error(here, getattr(exact, name)) <= FP32_ERROR, name


def test_statistics_of_a_row_do_not_depend_on_its_batch():
    x = on("cuda", {k: v for k, v in loss_head_inputs(*SHAPE, torch.bfloat16).items()})
    whole = fused_linear_statistics(**{k: x[k] for k in COMMON}, impl="triton")
    for rows in (torch.arange(7), torch.randperm(301)[:130]):
        rows = rows.cuda()
        part = {k: x[k][rows] if k.endswith(("_T", "_TD")) else x[k] for k in COMMON}
        found = fused_linear_statistics(**part, impl="triton")
        for name in STATISTICS:
            assert torch.equal(getattr(found, name), getattr(whole, name)[rows]), name


@pytest.mark.parametrize("vocabulary", [4999, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS[:18:3] + OPTIONS[18:20], ids=str)
def test_equal_streams_give_exactly_zero(options, dtype, vocabulary):
    x = on("cuda", loss_head_inputs(301, 64, vocabulary, dtype))
    given = {k: x[k] for k in ("student_TD", "head_VD", "target_T", "bias_V")}
    found = run(given | {"teacher_TD": x["student_TD"].clone()}, **options)
    for name in ("loss", "divergence_T", "d student_TD", "d head_VD", "d bias_V"):
        assert not found[name].any(), name


@pytest.mark.parametrize("options", [{"clip": 0.2}, {"divergence": "jsd"}, {"top_k": 9}], ids=str)
def test_runs_are_equal_to_the_bit(options):
    x = on("cuda", loss_head_inputs(*SHAPE, torch.bfloat16))
    first = run(x, **options)
    for name, value in run(x, **options).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("rows, vocabulary", [(70_001, 300), (20_000, 131_072)], ids=str)
def test_many_rows_and_more_than_2_31_logits(rows, vocabulary):
    x = loss_head_inputs(rows, 16, vocabulary, torch.float32)
    found = run(on("cuda", x), divergence="jsd", clip=0.2)
    assert all(value.isfinite().all() for value in found.values())
    for few in (slice(0, 3), slice(65_534, 65_539), slice(rows - 3, rows)):
        part = {k: v[few] if k.endswith(("_T", "_TD")) else v for k, v in x.items()}
        if len(part["target_T"]) == 0:
            continue
        exact = run(widened(part), "reference", divergence="jsd", clip=0.2)
        for name in (*STATISTICS, "d student_TD"):
            assert relative_error(found[name][few].cpu(), exact[name]) <= FP32_ERROR, name


def test_a_stream_of_its_own():
    x = on("cuda", loss_head_inputs(*SHAPE, torch.bfloat16))
    expected = run(x, divergence="jsd")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(x, divergence="jsd")
    stream.synchronize()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_a_device_that_is_not_current():
    x = loss_head_inputs(*SHAPE, torch.bfloat16)
    first = run(on("cuda:0", x), divergence="jsd")
    with torch.cuda.device(0):
        second = run(on("cuda:1", x), divergence="jsd")
        statistics = fused_linear_statistics(**on("cuda:1", {k: x[k] for k in COMMON}))
    assert statistics.entropy_T.device == torch.device("cuda:1")
    for name, value in first.items():
        assert torch.equal(second[name].cpu(), value.cpu()), name


@pytest.mark.parametrize("options", [{"clip": 0.2}, {"divergence": "jsd"}, {"top_k": 9}], ids=str)
def test_a_captured_graph_replays_on_new_values(options):
    """Rows of weight 0 among them: a graph cannot drop rows, so they are blanked."""
    x, y = (on("cuda", loss_head_inputs(*SHAPE, torch.float32, seed=s)) for s in (1, 2))
    for name in ("divergence_weight_T", "policy_weight_T", "entropy_weight_T"):
        y[name][::3] = 0
    leaves = {k: x[k].requires_grad_() for k in LEAVES}

    def step():
        out = fused_linear_loss(**x, **options, impl="triton")
        return out.loss, out.divergence_T, *torch.autograd.grad(out.loss, list(leaves.values()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, value in x.items():
            value.copy_(y[name])
    graph.replay()
    exact = run(widened({k: v.cpu() for k, v in y.items()}), "reference", **options)
    names = ("divergence_T", *(f"d {name}" for name in LEAVES))
    for value, name in zip(captured[1:], names, strict=True):
        assert relative_error(value.cpu(), exact[name]) <= FP32_ERROR, name


def test_compiles_as_one_graph():
    x = on("cuda", loss_head_inputs(*SHAPE, torch.bfloat16))
    plain = run(x, divergence="reverse_kl", clip=0.2)
    hidden = x["student_TD"].clone().requires_grad_()

    @torch.compile(fullgraph=True)
    def step(hidden_TD):
        given = {**x, "student_TD": hidden_TD * 1}
        return fused_linear_loss(**given, divergence="reverse_kl", clip=0.2, impl="triton").loss

    loss = step(hidden)
    loss.backward()
    assert torch.equal(loss, plain["loss"])
    assert torch.equal(hidden.grad, plain["d student_TD"])
