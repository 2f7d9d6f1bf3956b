"""Calls of the C++ loss head: scratch, layouts, subsets of gradients, each instruction set.

Shape suffixes: T rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from instruction_sets import PROBE, SETS, linux, run, runs_here
from loss_head_options import evaluate, widened
from native_cases import (
    BF16,
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

from fastsd_kernels import fused_linear_loss, fused_linear_statistics, native_library
from fastsd_kernels.loss_head.native import sweeps as native
from fastsd_kernels.testing import (
    BF16_GRADIENT_ERROR,
    FP32_ERROR,
    loss_head_inputs,
    poisoned_empty,
    relative_error,
)

SHAPE = (90, 16, 1031)


@pytest.fixture
def plans(monkeypatch):
    """The plans made, as (rows at a time, rows kept)."""
    made, make = [], native._plan

    def noted(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(native, "_plan", noted)
    return made


def small_scratch(monkeypatch, rows: int, again: bool, shape=SHAPE):
    """Room for `rows` rows of logit pairs; and for the head's fp32 sum, unless rows go again."""
    _, width, vocabulary = shape
    one = native_library.scratch_bytes(native_library.LOGITS, 1, 0, vocabulary)
    head = 0 if again else 4 * vocabulary * width
    monkeypatch.setattr(native, "SCRATCH_BYTES", rows * one + head)
    monkeypatch.setattr(native, "_SMALLEST_CHUNK", 256 if again else 1)


@pytest.mark.parametrize("terms, options, dtype", native_sweep(dtype=DTYPES))
def test_rows_beyond_the_scratch(terms, options, dtype, monkeypatch, plans):
    """They go in chunks or are computed again; the results are the same."""
    x = inputs(SHAPE, dtype, terms)
    options = without_clip(options, x)
    exact = evaluate(widened(x), "reference", **options)
    whole = evaluate(x, "native", **options)
    assert plans[-1].kept == plans[-1].chunk == SHAPE[0]
    for again in (False, True):
        small_scratch(monkeypatch, 3, again)
        found = evaluate(x, "native", **options)
        picked = options.get("top_k") and terms in ("all", "lean")
        if again and dtype == BF16 and not picked:
            assert plans[-1].kept < plans[-1].chunk == SHAPE[0]
        else:
            assert plans[-1].kept == plans[-1].chunk < SHAPE[0]
        assert torch.equal(found["d student_TD"], whole["d student_TD"])
        check(found, exact, **budgets(x, options))
        for name, value in whole.items():
            if name not in ("loss", *GRADIENTS):
                assert torch.equal(found[name], value), name


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_any_number_of_rows_at_a_time(rows, dtype, monkeypatch):
    x = inputs(SHAPE, dtype, "lean")
    exact = evaluate(widened(x), "reference", divergence="reverse_kl")
    for again in (False, True):
        small_scratch(monkeypatch, rows, again)
        found = evaluate(x, "native", divergence="reverse_kl")
        check(found, exact, **budgets(x, {}))


@pytest.mark.parametrize("again", [False, True])
def test_reads_no_unwritten_memory(again, monkeypatch):
    for terms, options in CASES:
        for dtype in (FP32, BF16):
            x = inputs((19, 15, 135), dtype, terms)
            chosen = without_clip(options, x)
            if again:
                small_scratch(monkeypatch, 1, True, (19, 15, 135))
            exact = evaluate(x, "native", **chosen)
            with poisoned_empty():
                found = evaluate(x, "native", **chosen)
            for name, value in exact.items():
                assert torch.equal(found[name], value), (name, terms, options, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_teacher_with_its_own_head_and_width(dtype):
    for width in (24, 16, 7):
        x = loss_head_inputs(29, 16, 263, dtype)
        other = loss_head_inputs(29, width, 263, dtype, seed=5)
        x["teacher_TD"] = other["student_TD"].detach()
        x["teacher_head_VD"] = other["head_VD"].detach()
        exact, found = evaluate(widened(x), "reference"), evaluate(x, "native")
        for name, value in exact.items():
            narrow = dtype == BF16 and name in GRADIENTS
            limit = BF16_GRADIENT_ERROR if narrow else FP32_ERROR
            assert relative_error(found[name], value) <= limit, (name, width)


@pytest.mark.parametrize(
    "wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)]
)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_only_the_gradients_asked_for(wanted, dtype, monkeypatch):
    """Each is the same bits as with all of them, with and without small scratch."""
    for rows in (None, 3):
        if rows:
            small_scratch(monkeypatch, rows, False)
        x = inputs(SHAPE, dtype, "lean")
        everything = evaluate(x, "native")
        leaves = {
            name: x[name].detach().clone().requires_grad_(bool(want))
            for name, want in zip(("student_TD", "head_VD", "bias_V"), wanted, strict=True)
        }
        out = fused_linear_loss(**{**x, **leaves}, impl="native")
        assert out.loss.requires_grad == any(wanted)
        if any(wanted):
            out.loss.backward()
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                assert torch.equal(leaf.grad, everything[f"d {name}"]), name
            else:
                assert leaf.grad is None
        torch.testing.assert_close(out.loss.detach(), everything["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_layouts(dtype):
    """Row strides, transposed matrices, single columns, int32 targets: the same bits."""
    for shape in (SHAPE, (5, 1, 70), (1, 9, 70), (6, 4, 1)):
        x = loss_head_inputs(*shape, dtype)
        plain = evaluate(x, "native")
        transposed, strided = dict(x), dict(x)
        for name in ("student_TD", "teacher_TD", "head_VD"):
            value = x[name].detach()
            transposed[name] = value.T.contiguous().T.requires_grad_(name != "teacher_TD")
            room = torch.full((value.shape[0], value.shape[1] + 3), torch.nan, dtype=dtype)
            room[:, 1:-2] = value
            strided[name] = room[:, 1:-2].requires_grad_(name != "teacher_TD")
        strided["target_T"] = x["target_T"].int().repeat_interleave(2)[::2]
        strided["policy_weight_T"] = x["policy_weight_T"].repeat_interleave(3)[::3]
        for other in (transposed, strided):
            for name, value in evaluate(other, "native").items():
                assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_statistics_are_those_of_the_loss(dtype, monkeypatch):
    x = loss_head_inputs(40, 16, 263, dtype)
    mask_T = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.6
    common = {k: x[k] for k in ("student_TD", "head_VD", "target_T", "teacher_TD", "bias_V")}
    for chunk in (4096, 7):
        monkeypatch.setattr(native, "_STATISTICS_CHUNK", chunk)
        for options in ({"divergence": "reverse_kl"}, {"top_k": 5}, {"divergence": "jsd"},
                        {"entry_clip": 0.01}, {"divergence": "sampled_token"}):  # fmt: skip
            loss = fused_linear_loss(**common, divergence_weight_T=mask_T, impl="native", **options)
            found = fused_linear_statistics(**common, mask_T=mask_T, **options, impl="native")
            for name, value in vars(found).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, getattr(loss, name)), (name, options)
                    assert not value[~mask_T].any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_large_vocabulary(dtype):
    x = loss_head_inputs(3, 8, 262_144, dtype)
    for options in ({}, {"divergence": "jsd", "top_k": 50}):
        exact = evaluate(widened(x), "reference", **options)
        check(evaluate(x, "native", **options), exact, **budgets(x, options))


def test_ties_among_the_likeliest():
    """Equal logits: some k of them, each once, and all of the mass is still accounted for."""
    x = loss_head_inputs(4, 8, 100, FP32)
    with torch.no_grad():
        x["head_VD"].zero_()
        x["bias_V"].zero_()
    found = fused_linear_loss(**x, divergence="reverse_kl", top_k=9, impl="native")
    assert not found.divergence_T.any() and found.loss.isfinite()


@pytest.mark.parametrize("top_k", [1, 2, 9, 99])
def test_likeliest_of_rows_that_are_not_numbers(top_k):
    """More bad entries than k, or fewer: no index leaves the vocabulary, and the row shows it."""
    for bad in (1, 5, 100):
        for value in (torch.nan, -torch.inf, torch.inf):
            x = loss_head_inputs(4, 8, 100, FP32)
            with torch.no_grad():
                x["bias_V"][:bad] = value
            found = evaluate(x, "native", top_k=top_k)
            assert not found["loss"].isfinite(), (bad, value)


def test_no_memory_is_an_error():
    rows = 1 << 44
    x = torch.zeros(1, 64)
    problem = native_library.problem(
        student=x, head=x, rows=rows, width=64, vocabulary=1, threads=1, scale=1.0
    )
    with pytest.raises(MemoryError, match="out of memory in fastsd_statistics"):
        native_library.call("statistics", problem)


OTHERS = "not instruction_set and not best_that_runs"  # else they would start themselves again
FEW = f"(every_option and lean or ragged and all or rows_at_a_time or layouts or used) and {OTHERS}"
ALL = f"not 49152 and {OTHERS}"  # GEMMs of that size take minutes without vector instructions


@linux
@pytest.mark.parametrize(
    "select, least",
    [(FEW, 50), pytest.param(ALL, 700, marks=pytest.mark.slow)],
    ids=["few", "all"],
)
@pytest.mark.parametrize("instruction_set", SETS)
def test_each_instruction_set(instruction_set, select, least):
    """The tests of these two files, slow ones too, with that set, chosen once a process."""
    if not runs_here(instruction_set):
        found = run(instruction_set, "-c", PROBE).stdout
        assert f"FASTSD_CPU_ISA='{instruction_set}' names no instruction set" in found
        return
    if instruction_set == native_library.instruction_set():
        return  # this process's own
    files = [str(Path(__file__).with_name(f"test_native{x}.py")) for x in ("", "_calls")]
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", select)
    found = run(instruction_set, *options, *files)
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(found.stdout.rsplit(" passed")[0].split()[-1]) > least


def test_the_forced_one_is_used():
    forced = os.environ.get("FASTSD_CPU_ISA")
    assert native_library.instruction_set() == forced or not forced


@linux
def test_the_default_is_the_best_that_runs():
    found = run("", "-c", PROBE).stdout.split()
    assert found == ["native", next(name for name in SETS if runs_here(name))]


def test_an_unknown_instruction_set_is_named():
    found = run("neon", "-c", PROBE).stdout
    assert "FASTSD_CPU_ISA='neon' names no instruction set that this processor runs" in found
    assert "expected avx512_bf16, avx512, avx2 or scalar" in found
