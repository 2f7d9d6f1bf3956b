"""fp32 linear layers through oneDNN against fp64; copies, checkpoints and frozen weights."""

import copy

import pytest
import torch
from tiny_models import build_tiny_llama

from fastsd.config.sections import LoraConfig, ModelConfig
from fastsd.model import load_policy
from fastsd.model.cpu_linear import onednn_linear, takes_onednn, use_onednn
from fastsd_kernels.testing import relative_error

pytestmark = pytest.mark.skipif(
    not takes_onednn(torch.empty(1)), reason="this torch has no oneDNN for x86"
)
# u = 6e-8 a rounding; sums of K <= 2049 terms in some order average theirs out.
ERROR = 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rows, inputs, outputs", [(1, 1, 1), (7, 33, 5), (130, 64, 257), (3, 2049, 2)]
)
def test_values_and_gradients(rows, inputs, outputs, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, rows, inputs, requires_grad=True)
    y = x.detach().double().requires_grad_()
    upstream = torch.randn(2, rows, outputs)
    found, want = onednn_linear(layer, x), exact(y)
    found.backward(upstream)
    want.backward(upstream.double())
    pairs = [(found, want), (x.grad, y.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), exact.parameters(), strict=True)]
    assert max(relative_error(a, b) for a, b in pairs) < ERROR


def test_strided_rows_and_frozen_weights():
    layer = torch.nn.Linear(8, 6).requires_grad_(False)
    x = torch.randn(8, 12, requires_grad=True)
    onednn_linear(layer, x.T).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0)[:, None].expand(8, 12))


def test_a_copy_has_its_own_weights():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    names = list(model.state_dict())
    use_onednn(model)
    assert list(model.state_dict()) == names
    other = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
    x = torch.randn(3, 4)
    assert not model(x).any() and other(x).abs().sum() > 0


def test_a_policy_takes_it_in_fp32_only(tmp_path):
    folder = str(build_tiny_llama(tmp_path))
    lora = LoraConfig(r=4, alpha=8, target_modules=["q_proj"])
    for config in (ModelConfig(name=folder), ModelConfig(name=folder, lora=lora)):
        policy = load_policy(config, "cpu", torch.float32)
        layers = [m for m in policy.decoder.modules() if type(m) is torch.nn.Linear]
        assert all(layer.forward.func is onednn_linear for layer in layers) and layers
        assert policy.linear_name == "onednn"
    policy = load_policy(ModelConfig(name=folder), "cpu", torch.bfloat16)
    assert not any("forward" in vars(m) for m in policy.decoder.modules())
    assert policy.linear_name == "torch"
