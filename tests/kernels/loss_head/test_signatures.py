"""The four public functions of the loss head take the same arguments with the same defaults."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from fastsd_kernels import (
    fused_linear_loss,
    fused_linear_statistics,
    vocabulary_sharded_linear_loss,
    vocabulary_sharded_linear_statistics,
)
from fastsd_kernels.loss_head.contract import Inputs, Options

LOSSES = (fused_linear_loss, vocabulary_sharded_linear_loss)
STATISTICS = (fused_linear_statistics, vocabulary_sharded_linear_statistics)
SHARDED = {"vocabulary_start", "group", "reduce_hidden_gradient"}
# What the loss weighs; statistics take one mask in their place.
WEIGHTS = {
    "divergence_weight_T",
    "policy_weight_T",
    "old_logprob_T",
    "clip",
    "entropy_weight_T",
}


def parameters(function) -> dict[str, inspect.Parameter]:
    """By name; a shard of the head counts as the head."""
    found = inspect.signature(function).parameters
    return {name.replace("head_shard_VD", "head_VD"): given for name, given in found.items()}


def alike(one: inspect.Parameter, other: inspect.Parameter) -> bool:
    return (one.kind, one.default, one.annotation) == (other.kind, other.default, other.annotation)


@pytest.mark.parametrize("function", [*LOSSES, *STATISTICS], ids=lambda f: f.__name__)
def test_options_have_the_defaults_of_the_contract(function):
    found = parameters(function)
    for field in fields(Options):
        if field.name == "clip" and function in STATISTICS:
            assert field.name not in found
            continue
        assert found[field.name].default == field.default, field.name
        assert found[field.name].annotation == field.type, field.name
        assert found[field.name].kind == inspect.Parameter.KEYWORD_ONLY, field.name


@pytest.mark.parametrize("one, sharded", [LOSSES, STATISTICS], ids=["loss", "statistics"])
def test_with_and_without_shards(one, sharded):
    whole, part = parameters(one), parameters(sharded)
    assert set(part) - set(whole) == SHARDED & set(part)
    assert set(whole) - set(part) == {"impl"}
    common = [name for name in whole if name in part]
    assert common == [name for name in part if name in whole]  # in one order
    for name in common:
        assert alike(whole[name], part[name]), name


@pytest.mark.parametrize("which", [0, 1], ids=["whole", "sharded"])
def test_statistics_are_the_loss_without_its_weights(which):
    weighed, plain = parameters(LOSSES[which]), parameters(STATISTICS[which])
    assert set(plain) - set(weighed) == {"mask_T"}
    assert set(weighed) - set(plain) == WEIGHTS | ({"reduce_hidden_gradient"} & set(weighed))
    for name in set(weighed) & set(plain):
        assert alike(weighed[name], plain[name]), name


@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
def test_every_tensor_of_the_contract_is_an_argument(function):
    names = {field.name for field in fields(Inputs)}
    assert names <= set(parameters(function))
    assert set(parameters(function)) == names | {f.name for f in fields(Options)} | (
        {"impl"} if function is fused_linear_loss else SHARDED
    )


def test_a_changed_default_is_seen():
    def changed(*, beta: float = 0.25): ...

    assert not alike(parameters(changed)["beta"], parameters(fused_linear_loss)["beta"])
