"""The vocabulary-sharded loss head on 2 and 3 gloo ranks against a single rank.

All cases run in one launch of three ranks (sharded_worker.py), two of which are the smaller
group. Shards are uneven: one of three ranks holds a single entry.
"""

from __future__ import annotations

import re

import pytest
import torch
from ranks import run_ranks
from sharded_cases import (
    CHUNK_ROWS,
    METERED,
    MISMATCHES,
    OPTIONS,
    OTHER_CASES,
    SCALES,
    SIZES,
    STATISTICS,
    WRONG,
    D,
    T,
    every_case,
    extreme,
    inputs,
)

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.testing import (
    BF16_GRADIENT_ERROR,
    FP32_ERROR,
    FP32_ERROR_AT_SCALE_8,
    relative_error,
)
from tests.kernels.loss_head import sharded_worker

LEAVES = ("student_TD", "head_VD", "bias_V")
GRADIENTS = ("d student_TD", "d head_VD", "d bias_V")
CHUNKS = -(-T // CHUNK_ROWS)
# Sums of up to T V terms in another order: u = 1.1e-16 in fp64, 6e-8 in fp32.
FP64_ERROR, FP32_AGAINST_ONE_RANK = 1e-12, 1e-6


@pytest.fixture(scope="module")
def spawned(tmp_path_factory) -> dict[int, dict[str, list[dict]]]:
    """For 2 and 3 ranks: what each rank found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save({n: list(every_case(n).values()) for n in SIZES}, folder / "cases.pt")
    run_ranks(sharded_worker.main, folder, ranks=3)
    by_rank = [torch.load(folder / f"{rank}.pt") for rank in range(3)]
    found = {}
    for ranks in SIZES:
        of_case = zip(*(by_rank[rank][ranks] for rank in range(ranks)), strict=True)
        found[ranks] = {k: list(x) for k, x in zip(every_case(ranks), of_case, strict=True)}
    return found


def one_rank(x: dict, impl: str, **options) -> dict[str, torch.Tensor]:
    """Loss, statistics and gradients of the unsharded call."""
    leaves = {k: x[k].detach().clone().requires_grad_() for k in LEAVES if k in x}
    out = fused_linear_loss(**(x | leaves), **options, impl=impl)
    out.loss.backward()
    found = {k: v.detach() for k, v in vars(out).items() if isinstance(v, torch.Tensor)}
    return found | {f"d {k}": v.grad for k, v in leaves.items()}


def widened(x: dict) -> dict:
    return {k: v.double() if v.is_floating_point() else v for k, v in x.items()}


def together(case: dict, results: list[dict]) -> dict[str, torch.Tensor]:
    """The whole result: equal on every rank to the bit, or the shards' gradients in order."""
    assert not [r["error"] for r in results if "error" in r]
    everyone = [r["found"] for r in results]
    order = case.get("order", range(len(results)))
    found = {}
    for name, value in everyone[0].items():
        parts = [other[name] for other in everyone]
        if name in ("d head_VD", "d bias_V"):
            found[name] = torch.cat([part for _, part in sorted(zip(order, parts, strict=True))])
        elif case["options"].get("reduce_hidden_gradient", True) or name != "d student_TD":
            assert all(torch.equal(part, value) for part in parts), name
            found[name] = value
        else:
            found[name] = torch.stack(parts).sum(0)
        if name.startswith("d "):
            found[name] = found[name] / case["upstream"]
    return found


def check(found: dict, exact: dict, budget: float, names=None) -> None:
    assert found.keys() == exact.keys()
    for name in names or exact:
        assert relative_error(found[name], exact[name]) <= budget, name


both = pytest.mark.parametrize("ranks", SIZES)
every = pytest.mark.parametrize("options", OPTIONS, ids=str)


@both
@every
def test_fp64_is_the_reference(spawned, ranks, options):
    name = f"{torch.float64} {options}"
    found = together(every_case(ranks)[name], spawned[ranks][name])
    check(found, one_rank(inputs(), "reference", **options), FP64_ERROR)


@both
@every
def test_fp32_is_one_rank(spawned, ranks, options):
    name = f"{torch.float32} {options}"
    x = inputs(torch.float32)
    found = together(every_case(ranks)[name], spawned[ranks][name])
    one, exact = one_rank(x, "chunked", **options), one_rank(widened(x), "reference", **options)
    check(found, exact, FP32_ERROR, ("loss", *GRADIENTS))
    well_conditioned = [n for n in one if n != "divergence_T" or not options.get("entry_clip")]
    check(found, one, FP32_AGAINST_ONE_RANK, well_conditioned)
    # A clip takes away positive summands only: D may be a small difference of large sums, known to
    # neither call to 1e-6. Then the shards may add that much to the single rank's own error.
    error = relative_error(one["divergence_T"], exact["divergence_T"])
    check(found, exact, error + FP32_AGAINST_ONE_RANK, ["divergence_T"])


@both
@every
def test_bf16_error_budget(spawned, ranks, options):
    name = f"{torch.bfloat16} {options}"
    x = inputs(torch.bfloat16)
    found = together(every_case(ranks)[name], spawned[ranks][name])
    exact = one_rank(widened(x), "reference", **options)
    check(found, exact, FP32_ERROR, ("loss", "divergence_T", "entropy_T"))
    check(found, exact, BF16_GRADIENT_ERROR, GRADIENTS)


@every
def test_equal_streams_give_exactly_zero(spawned, options):
    ranks = 3
    for dtype in (torch.float32, torch.bfloat16):
        name = f"equal {dtype} {options}"
        found = together(every_case(ranks)[name], spawned[ranks][name])
        for value in ("loss", "divergence_T", *GRADIENTS):
            assert not found[value].any(), (value, dtype)


@every
@pytest.mark.parametrize("scale", SCALES)
def test_extreme_logits_stay_finite(spawned, options, scale):
    ranks = 3
    name = f"extreme {scale} {options}"
    found = together(every_case(ranks)[name], spawned[ranks][name])
    assert all(value.isfinite().all() for value in found.values())
    exact = one_rank(widened(extreme(scale)), "reference", **options)
    # z carries an absolute error of 1e4 u D^.5 = 2e-3 here, so the loss is only close.
    torch.testing.assert_close(
        found["loss"].double(), exact["loss"], rtol=1e-3 if scale > 100 else 1e-4, atol=1e-3
    )


@both
@pytest.mark.parametrize("name", OTHER_CASES)
def test_other_cases(spawned, ranks, name):
    x, options = OTHER_CASES[name]
    found = together(every_case(ranks)[name], spawned[ranks][name])
    check(found, one_rank(x, "reference", **options), FP64_ERROR)


@both
def test_fp32_at_scale_8(spawned, ranks):
    found = together(every_case(ranks)["scale 8"], spawned[ranks]["scale 8"])
    exact = one_rank(widened(inputs(torch.float32)), "reference", logit_scale=8.0)
    check(found, exact, FP32_ERROR_AT_SCALE_8, ("loss", *GRADIENTS))


@both
@pytest.mark.parametrize("name", ["other order", "partial"])
def test_order_of_shards_and_partial_gradients(spawned, ranks, name):
    found = together(every_case(ranks)[name], spawned[ranks][name])
    check(found, one_rank(inputs(), "reference"), FP64_ERROR)


@both
@pytest.mark.parametrize("options", STATISTICS, ids=str)
def test_statistics_are_those_of_one_rank(spawned, ranks, options):
    case, results = (x[f"statistics {options}"] for x in (every_case(ranks), spawned[ranks]))
    exact = fused_linear_statistics(**case["inputs"], **options, impl="reference")
    exact = {k: v for k, v in vars(exact).items() if isinstance(v, torch.Tensor)}
    check(together(case, results), exact, FP64_ERROR)
    assert all(result["work"]["all_reduce"] == 0 for result in results)


@both
def test_messages_and_work(spawned, ranks):
    """A message for the call, two a chunk, a sum a chunk; four GEMMs of the shard."""
    for name, sums in zip(METERED, (CHUNKS, 0), strict=True):
        for size, result in zip(SIZES[ranks], spawned[ranks][name], strict=True):
            work = result["work"]
            assert work["all_gather"] == 1 + 2 * CHUNKS and work["all_reduce"] == sums
            assert work["flop"] == 4 * 2 * T * D * size


@both
@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_that_differ_are_refused_everywhere(spawned, ranks, name):
    own, message = MISMATCHES[name]
    errors = [found["error"] for found in spawned[ranks][f"mismatch {name}"]]
    for error in errors:
        assert re.search(message, error), error
    if name in ("width", "start"):
        assert all(
            "rank 1 of the group refused its call" in errors[r] for r in (0, ranks - 1) if r != 1
        )


@both
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_everywhere(spawned, ranks, name):
    for found in spawned[ranks][f"wrong {name}"]:
        assert re.search(WRONG[name][2], found["error"]), found["error"]
