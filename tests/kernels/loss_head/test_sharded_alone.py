"""The vocabulary-sharded loss head in one process without a group: autograd, dtypes, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head.sharded import (
    evaluation,
    vocabulary_sharded_linear_loss,
    vocabulary_sharded_linear_statistics,
)
from fastsd_kernels.testing import WorkMeter, loss_head_inputs, poisoned_empty, relative_error

T, D, V = 23, 8, 63
LEAVES = ("student_TD", "head_VD", "bias_V")
OPTIONS = [
    {"divergence": "reverse_kl", "clip": 0.2},
    {"divergence": "jsd", "top_k": 5, "entry_clip": 0.05},
    {"top_k": 5, "tail": False, "softcap": 2.0},
]
FP64_ERROR = 1e-12


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch):
    monkeypatch.setitem(evaluation.SCRATCH_BYTES, "cpu", 7 * 2 * V * 8)
    monkeypatch.setitem(evaluation.TILE_LOGITS, "cpu", 3 * V)


def loss(x: dict, **options):
    x = dict(x)
    matrices = x.pop("student_TD"), x.pop("head_VD"), x.pop("target_T")
    return vocabulary_sharded_linear_loss(*matrices, vocabulary_start=0, **x, **options)


def evaluate(x: dict, function=loss, **options) -> dict[str, torch.Tensor]:
    leaves = {k: x[k].detach().clone().requires_grad_() for k in LEAVES}
    out = function(**(x | leaves), **options) if function is fused_linear_loss else function(
        x | leaves, **options
    )  # fmt: skip
    out.loss.backward()
    found = {k: v.detach() for k, v in vars(out).items() if isinstance(v, torch.Tensor)}
    return found | {f"d {k}": v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_alone_it_is_the_reference(options):
    x = loss_head_inputs(T, D, V)
    exact = evaluate(x, fused_linear_loss, impl="reference", **options)
    found = evaluate(x, **options)
    assert found.keys() == exact.keys() and loss(x, **options).impl == "sharded"
    for name, value in exact.items():
        assert found[name].dtype == value.dtype
        assert relative_error(found[name], value) <= FP64_ERROR, name


def test_gradcheck():
    x = loss_head_inputs(3, 4, 7, seed=1)
    # The teacher's use of the head and bias is a constant, so they get a copy, or no bias.
    x["teacher_head_VD"] = x["head_VD"].detach().clone()
    wrt = x.pop("student_TD"), x.pop("head_VD")
    x["bias_V"] = x["bias_V"].detach()
    assert torch.autograd.gradcheck(
        lambda h, w: loss(x | {"student_TD": h, "head_VD": w}, divergence="jsd").loss, wrt
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reads_no_unwritten_memory(options):
    x = loss_head_inputs(T, D, V, torch.float32)
    exact = evaluate(x, **options)
    with poisoned_empty():
        found = evaluate(x, **options)
    for name, value in exact.items():
        assert torch.equal(found[name], value), name


def test_gradients_cost_only_what_is_wanted():
    x = loss_head_inputs(T, D, V, torch.float32)
    for frozen, train, gemms in ((False, True, 4), (True, True, 3), (False, False, 2)):
        x["head_VD"].requires_grad_(not frozen)
        with WorkMeter() as meter, torch.set_grad_enabled(train):
            out = loss(x)
            assert out.loss.requires_grad == train
            if train:
                out.loss.backward()
        assert meter.product_flop == gemms * 2 * T * D * V


def test_no_full_logits(monkeypatch):
    rows, vocabulary, chunk = 200, 999, 9
    monkeypatch.setitem(evaluation.SCRATCH_BYTES, "cpu", chunk * 2 * vocabulary * 4)
    for options in OPTIONS:
        x = loss_head_inputs(rows, D, vocabulary, torch.float32)
        with WorkMeter() as meter:
            loss(x, **options).loss.backward()
        assert meter.largest_bytes <= 4 * chunk * vocabulary


def test_backward_twice_and_upstream_gradient():
    x = loss_head_inputs(T, D, V, torch.float32)
    out = loss(x)
    first = torch.autograd.grad(out.loss, x["head_VD"], retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(2 * out.loss, x["head_VD"])[0], 2 * first)
    assert not out.divergence_T.requires_grad


def test_a_tied_head_accumulates():
    x = loss_head_inputs(T, D, V)
    embedding_VD, gradients = x.pop("head_VD"), []
    for function in (lambda x: fused_linear_loss(**x, impl="reference"), loss):
        student_TD = torch.tanh(embedding_VD[x["target_T"]])
        total = function(x | {"student_TD": student_TD, "head_VD": embedding_VD}).loss
        gradients.append(torch.autograd.grad(total, embedding_VD)[0])
    assert relative_error(gradients[1], gradients[0]) <= FP64_ERROR


def test_autocast_casts_the_matrices():
    x = loss_head_inputs(T, D, V, torch.float32)
    low = x | {k: v.detach().bfloat16() for k, v in x.items() if k.endswith(("_TD", "_VD"))}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate(x)
    assert torch.equal(found["loss"], loss(low).loss)
    assert found["d head_VD"].dtype == found["d student_TD"].dtype == torch.float32


def test_the_teachers_head_may_be_the_same_memory():
    x = loss_head_inputs(T, D, V, torch.float32)
    again = loss(x, teacher_head_VD=x["head_VD"].detach())
    assert torch.equal(again.divergence_T, loss(x).divergence_T)


def test_statistics_have_no_graph():
    x = loss_head_inputs(T, D, V)
    found = vocabulary_sharded_linear_statistics(
        x["student_TD"], x["head_VD"], x["target_T"], vocabulary_start=0, bias_V=x["bias_V"]
    )
    exact = loss({k: v for k, v in x.items() if k not in ("teacher_TD", "divergence_weight_T")})
    assert torch.equal(found.entropy_T, exact.entropy_T) and not found.entropy_T.requires_grad
    assert found.divergence_T is None and found.impl == "sharded"


WRONG = [
    ({"head_VD": torch.zeros(V, D + 1)}, {}, ValueError, r"^head_shard_VD: expected \[V, 8\]"),
    ({"student_TD": [[0.0]]}, {}, TypeError, "student_TD: expected a tensor, got list"),
    ({"teacher_head_VD": torch.zeros(V + 1, D)}, {}, ValueError, "teacher_head_VD.*head_shard_VD"),
    ({"policy_weight_T": None}, {}, ValueError, "old_logprob_T: given without policy_weight_T"),
    ({}, {"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
    ({}, {"top_k": V + 1}, ValueError, "top_k: expected 1 <= top_k <= V = 63"),
    ({"target_T": torch.full((T,), -1)}, {}, ValueError, "target_T.*got -1 at row 0"),
]


@pytest.mark.parametrize("change, options, kind, message", WRONG, ids=[w[3] for w in WRONG])
def test_refused(change, options, kind, message):
    with pytest.raises(kind, match=message):
        loss(loss_head_inputs(T, D, V, torch.float32) | change, **options)


def test_a_shard_of_nothing_is_refused_alone():
    x = loss_head_inputs(T, D, V, torch.float32)
    with pytest.raises(ValueError, match=r"vocabulary_start: .*\[1, 64\) on rank 0"):
        vocabulary_sharded_linear_statistics(
            x["student_TD"], x["head_VD"], x["target_T"], vocabulary_start=1
        )


def test_a_group_needs_torch_distributed():
    assert not dist.is_initialized()
    x = loss_head_inputs(T, D, V, torch.float32)
    with pytest.raises(ValueError, match="group: given, but torch.distributed is not initialised"):
        loss(x, group=object())
