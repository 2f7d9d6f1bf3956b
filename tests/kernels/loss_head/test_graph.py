"""The loss in autograd graphs: many uses, scaling, autocast, accumulation, and what is kept."""

from __future__ import annotations

import pytest
import torch
from loss_head_cases import HERE, LEAVES, case, close, equal, step
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.loss_head import op, reference
from fastsd_kernels.loss_head.contract import Inputs, Options
from fastsd_kernels.testing import FP32_ERROR, WorkMeter, loss_head_inputs, relative_error


def test_the_definition_is_differentiable_twice():
    x, _ = case({}, rows=3, width=3, vocabulary=5, dtype=torch.float64)
    x = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    student_TD = x.pop("student_TD")
    x["head_VD"], x["bias_V"] = x["head_VD"].detach(), x["bias_V"].detach()
    options = Options(divergence="jsd", beta=0.3)
    assert torch.autograd.gradgradcheck(
        lambda h: reference.loss(Inputs(student_TD=h, **x), options)[0], student_TD
    )


@pytest.mark.parametrize("impl", HERE)
def test_a_second_derivative_is_refused(impl):
    x, _ = case({})
    loss = fused_linear_loss(**x, impl=impl).loss
    with pytest.raises(RuntimeError, match="differentiable once.*create_graph"):
        torch.autograd.grad(loss, x["student_TD"], create_graph=True)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("upstream", [-1.7, 0.0])
def test_upstream_gradients_scale(impl, upstream):
    x, _ = case({})
    unit = step(x, impl=impl)
    scaled = step(x, impl=impl, upstream=upstream)
    expected = {k: v if k == "loss" else v * upstream for k, v in unit.items()}
    equal(scaled, expected)


@pytest.mark.parametrize("impl", HERE)
def test_a_loss_that_leads_nowhere_and_one_with_no_leaf(impl):
    x, _ = case({})
    out = fused_linear_loss(**x, impl=impl)
    unused = torch.autograd.grad(x["student_TD"].sum() + 0 * out.loss, x["head_VD"])[0]
    assert not unused.any()
    assert not any(getattr(out, name).requires_grad for name in ("entropy_T", "divergence_T"))
    frozen = {name: value.detach() for name, value in x.items()}
    assert not fused_linear_loss(**frozen, impl=impl).loss.requires_grad


@pytest.mark.parametrize("impl", HERE)
def test_teacher_and_weights_are_constants(impl):
    x, _ = case({})
    trained = {name: value.detach() for name, value in x.items()}
    constants = [name for name in x if name not in (*LEAVES, "target_T")]
    for name in constants:
        trained[name].requires_grad_()
    assert not fused_linear_loss(**trained, impl=impl).loss.requires_grad
    trained["student_TD"].requires_grad_()
    fused_linear_loss(**trained, impl=impl).loss.backward()
    assert trained["student_TD"].grad.any()
    assert all(trained[name].grad is None for name in constants)
    tensors = [trained[name] for name in ("student_TD", "head_VD", "target_T", "bias_V")]
    rows = op.linear_statistics(
        *tensors, trained["teacher_TD"], None, None, *list(vars(Options()).values())[:-1], impl
    )
    assert not any(value.requires_grad for value in rows)


@pytest.mark.parametrize("impl", HERE)
def test_backward_twice_accumulates(impl):
    """The gradients that the graph keeps must not become the leaf's .grad, to be added to."""
    x, _ = case({})
    once = step(x, impl=impl)
    loss = fused_linear_loss(**x, impl=impl).loss
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        for name in LEAVES:
            torch.testing.assert_close(x[name].grad, times * once[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", HERE)
def test_one_head_in_many_places_of_a_graph(impl):
    """Tied embeddings: a lookup, the head of one call and of another; teachers are constants."""
    table_VD = loss_head_inputs(1, 6, 23, torch.float32)["head_VD"].detach()
    token_T = torch.arange(9) % 5
    weight_T = torch.linspace(0.1, 1, 9)

    def total(weights_VD, loss):
        hidden_TD = torch.tanh(weights_VD[token_T])
        teacher_TD = torch.tanh(weights_VD[token_T.flip(0)]).detach()
        first = loss(hidden_TD, weights_VD, token_T, teacher_TD)
        second = loss(hidden_TD.flip(0) * 2, weights_VD, token_T, teacher_TD)
        return first + 0.3 * second + weights_VD.square().sum()

    def fused(hidden_TD, weights_VD, target_T, teacher_TD):
        return fused_linear_loss(
            hidden_TD, weights_VD, target_T, teacher_TD=teacher_TD,
            divergence_weight_T=weight_T, policy_weight_T=weight_T - 0.5, impl=impl,
        ).loss  # fmt: skip

    def defined(hidden_TD, weights_VD, target_T, teacher_TD):
        w = weight_T.double()
        inputs = Inputs(hidden_TD, weights_VD, target_T, None, teacher_TD,
                        divergence_weight_T=w, policy_weight_T=w - 0.5)  # fmt: skip
        return reference.loss(inputs, Options())[0]

    found_VD, exact_VD = table_VD.clone(), table_VD.double()
    for weights_VD, loss in ((found_VD, fused), (exact_VD, defined)):
        weights_VD.requires_grad_()
        total(weights_VD, loss).backward()
    assert relative_error(found_VD.grad, exact_VD.grad) <= FP32_ERROR


@pytest.mark.parametrize("impl", HERE)
def test_micro_batches_add_up(impl):
    x, _ = case({}, rows=21)
    x["divergence_weight_T"][7:14] = 0  # a micro-batch in which one term does not count
    whole = step(x, impl=impl)
    leaves = {name: x[name].detach().clone().requires_grad_() for name in LEAVES}
    by_row = [name for name in x if name.endswith(("_TD", "_T"))]
    total = 0.0
    for start in (0, 7, 14):
        part = {**x, **leaves}
        part |= {name: part[name][start : start + 7] for name in by_row}
        loss = fused_linear_loss(**part, impl=impl).loss
        loss.backward()
        total = total + loss.detach()
    parts = {"loss": total} | {name: leaf.grad for name, leaf in leaves.items()}
    close(parts, whole, FP32_ERROR)


@pytest.mark.parametrize("impl", HERE)
def test_no_grad_and_inference_mode(impl):
    x, _ = case({})
    expected = fused_linear_loss(**x, impl=impl)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = fused_linear_loss(**x, impl=impl)
            alone = fused_linear_statistics(
                *(x[name] for name in ("student_TD", "head_VD", "target_T")), impl=impl
            )
        assert not found.loss.requires_grad and not alone.entropy_T.requires_grad
        assert relative_error(found.loss, expected.loss.detach()) <= FP32_ERROR
    with torch.no_grad(), WorkMeter() as meter:
        fused_linear_loss(**x, impl="chunked")
    assert meter.products == 2


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("own_head", [False, True])
def test_autocast_is_a_cast_before_the_call(impl, own_head):
    x, _ = case({}, rows=12)
    if own_head:
        x["teacher_head_VD"] = x["head_VD"].detach().clone()
    names = [name for name in x if name.endswith(("_TD", "_VD"))]
    narrow = step({**x, **{name: x[name].bfloat16() for name in names}}, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(x, impl=impl)
    assert all(value.dtype == torch.float32 for value in found.values())
    equal({name: value.to(narrow[name].dtype) for name, value in found.items()}, narrow)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused_linear_statistics(x["student_TD"], x["head_VD"], x["target_T"], impl=impl)
    assert found.entropy_T.dtype == torch.float32 and not found.entropy_T.requires_grad


def test_autograd_keeps_the_gradients_and_nothing_else():
    x, _ = case({"divergence": "jsd"}, rows=40, width=6, vocabulary=100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fused_linear_loss(**x, divergence="jsd")
    assert sorted(tuple(t.shape) for t in kept) == [(40, 6), (100,), (100, 6)]
    rows = [getattr(out, name) for name in op.STATISTICS if getattr(out, name) is not None]
    assert all(value_T.untyped_storage().nbytes() <= 40 * 8 for value_T in rows)


class Names(TorchDispatchMode):
    """Names of the operators that ran within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_usual_backward_is_no_work():
    """No copy, product or zeros for the other outputs: the leaf gets the tensor that is kept."""
    x, _ = case({})
    loss = fused_linear_loss(**x).loss
    with Names() as ran:
        loss.backward()
    assert set(ran.names) == {"aten::ones_like", "aten::_local_scalar_dense", "aten::detach"}


def test_a_frozen_head_costs_no_gradient():
    x, _ = case({}, rows=40, vocabulary=100)
    x["head_VD"], x["bias_V"] = x["head_VD"].detach(), x["bias_V"].detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_linear_loss(**x)
    assert sorted(tuple(t.shape) for t in kept) == [(0,), (0,), (40, 6)]
