"""The optimizer against plain torch arithmetic, its guards, and exact resume."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from fastsd.config.sections import OptimConfig
from fastsd.errors import CheckpointError, FastsdError, TrainingDiverged
from fastsd.training.optimizer import Optimizer
from fastsd.training.schedule import learning_rate


class Net(torch.nn.Module):
    """An embedding tied to the head, a matrix, a norm and a bias."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(11, 6)
        self.mid = torch.nn.Linear(6, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        return self.head(self.norm(self.mid(self.embed(ids))))


def fill_grads(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def digest(model, optimizer):
    sha = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **optimizer.state_tensors()}
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    sha.update(repr(sorted(optimizer.state_json()["updates"].items())).encode())
    return sha.hexdigest()


def adamw_fp64(weights, grads_per_step, config):
    """AdamW by its paper's formulas in fp64, with clipping by the global norm."""
    weights = [w.double() for w in weights]
    m = [torch.zeros_like(w) for w in weights]
    v = [torch.zeros_like(w) for w in weights]
    beta1, beta2 = config.betas
    for t, grads in enumerate(grads_per_step, start=1):
        lr = learning_rate(config, t - 1)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        scale = min(1.0, config.max_grad_norm / norm)
        for i, g in enumerate(grads):
            g = g.double() * scale
            decay = config.weight_decay if weights[i].ndim >= 2 else 0.0
            weights[i] = weights[i] * (1 - lr * decay)
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            update = (m[i] / (1 - beta1**t)) / ((v[i] / (1 - beta2**t)).sqrt() + config.eps)
            weights[i] = weights[i] - lr * update
    return weights


@pytest.mark.parametrize("scale", [0.01, 3.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_fp64_adamw(dtype, scale):
    config = OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=3, steps=12, schedule="cosine")
    model = Net(dtype)
    optimizer = Optimizer(model, config)
    start = [p.detach().clone() for p in model.parameters()]
    history = []
    for step in range(12):
        fill_grads(model, step, scale)
        history.append([p.grad.clone() for p in model.parameters()])
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in history[-1]))
        out = optimizer.step()
        assert out["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert out["lr"] == learning_rate(config, step)
        assert out["skipped"] == 0.0
    expected = adamw_fp64(start, history, config)
    # 12 updates, each a few fp32 roundings of numbers below 4 (half an ulp is 1.2e-7).
    for got, want in zip(optimizer.masters.values(), expected, strict=True):
        assert (got.double() - want).abs().max() < 12 * 4 * 1.2e-7
    for name, p in model.named_parameters():
        assert torch.equal(p, optimizer.masters[name].to(dtype))
        assert p.grad is None


def test_fp32_is_its_own_master_and_bf16_has_one():
    full = Optimizer(Net(), OptimConfig())
    assert all(full.masters[n] is p for n, p in full.parameters.items())
    half = Optimizer(Net(torch.bfloat16), OptimConfig())
    assert all(m.dtype == torch.float32 for m in half.masters.values())


def test_master_keeps_updates_that_bf16_would_lose():
    # lr 1e-4 is far below half an ulp of bf16 at 1.0 (2^-9): without a master nothing ever moves.
    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = Optimizer(model, OptimConfig(lr=1e-4))
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    # The constant gradient makes every update lr up to AdamW's eps.
    assert optimizer.masters["weight"].mean().item() == pytest.approx(0.99, abs=1e-5)
    assert torch.equal(model.weight, torch.full((4, 4), 0.99).bfloat16())


def test_tied_matrix_once_and_frozen_never():
    model = Net()
    model.mid.weight.requires_grad_(False)
    optimizer = Optimizer(model, OptimConfig())
    assert list(optimizer.parameters) == ["embed.weight", "mid.bias", "norm.weight", "norm.bias"]
    before = model.mid.weight.clone()
    fill_grads(model, 0)
    optimizer.step()
    assert torch.equal(model.mid.weight, before)
    assert model.head.weight is model.embed.weight
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(FastsdError, match="model.freeze"):
        Optimizer(model, OptimConfig())


def test_no_decay_on_vectors():
    model = Net()
    optimizer = Optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5, max_grad_norm=1e9))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.mid.bias.grad[0] = 1.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert torch.allclose(model.mid.weight, before["mid.weight"] * 0.95, rtol=3e-7, atol=0)


def test_schedule():
    cosine = OptimConfig(lr=1.0, steps=10, warmup_steps=4, schedule="cosine")
    assert [learning_rate(cosine, s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(cosine, 7) == pytest.approx(0.5)
    assert 0 < learning_rate(cosine, 9) < 0.1
    assert learning_rate(cosine, 10) == 0.0
    assert learning_rate(OptimConfig(lr=0.3), 10**6) == 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_200_nonfinite_gradients_move_nothing(dtype):
    model = Net(dtype)
    optimizer = Optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    generator = torch.Generator().manual_seed(1)
    for injection in range(200):
        fill_grads(model, injection)
        optimizer.step()
        before = digest(model, optimizer)
        fill_grads(model, 1000 + injection)
        parameters = list(model.parameters())
        victim = parameters[injection % len(parameters)].grad.view(-1)
        where = int(torch.randint(victim.numel(), (1,), generator=generator))
        victim[where] = [math.nan, math.inf, -math.inf][injection % 3]
        out = optimizer.step()
        assert out["skipped"] == 1.0 and not math.isfinite(out["grad_norm"])
        assert digest(model, optimizer) == before
        assert all(p.grad is None for p in model.parameters())
    assert optimizer.nonfinite_steps == 200
    assert optimizer.nonfinite_in_a_row == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_200_nonfinite_losses_move_nothing(dtype):
    """The gradients are finite, of one micro-batch or of several, and the loss is not."""
    model = Net(dtype)
    optimizer = Optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    generator = torch.Generator().manual_seed(1)

    def run(bad=None):
        micro_batches = 1 + int(torch.randint(3, (1,), generator=generator))
        victim = int(torch.randint(micro_batches, (1,), generator=generator))
        for index in range(micro_batches):
            ids = torch.randint(11, (5,), generator=generator)
            loss = model(ids).float().logsumexp(-1).mean()
            optimizer.backward(loss if bad is None or index != victim else loss + bad)
        return optimizer.step()

    for injection in range(200):
        assert run()["skipped"] == 0.0
        before = digest(model, optimizer)
        out = run([math.nan, math.inf, -math.inf][injection % 3])
        assert out["skipped"] == 1.0 == out["guard/nonfinite"] and math.isfinite(out["grad_norm"])
        assert digest(model, optimizer) == before
    assert (optimizer.nonfinite_steps, optimizer.nonfinite_in_a_row) == (200, 1)


def test_five_bad_losses_in_a_row_stop_and_leave_the_state_they_found():
    model = Net()
    optimizer = Optimizer(model, OptimConfig())
    for attempt in range(5):
        before = digest(model, optimizer), optimizer.state_json()
        optimizer.backward(model(torch.arange(3)).sum() + math.inf)
        if attempt < 4:
            optimizer.step()
    with pytest.raises(TrainingDiverged, match=r"5 non-finite.*update 5.*the loss \(inf\)"):
        optimizer.step()
    assert (digest(model, optimizer), optimizer.state_json()) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_spike_moves_nothing_and_is_no_empty_step(dtype):
    asked = []
    model = Net(dtype)

    def is_spike(grad_norm, loss):
        asked.append((grad_norm, loss))
        return grad_norm > 100

    optimizer = Optimizer(model, OptimConfig(lr=1e-2), is_spike)
    for scale, skipped in ((1.0, 0.0), (1000.0, 1.0), (1.0, 0.0)):
        before = digest(model, optimizer)
        loss = scale * model(torch.arange(3)).float().logsumexp(-1).mean()
        optimizer.backward(loss)
        out = optimizer.step()
        assert (out["skipped"], out["guard/spike"]) == (skipped, skipped)
        assert (digest(model, optimizer) == before) == bool(skipped)
        assert asked[-1] == (out["grad_norm"], loss.item())
    assert (optimizer.calls, optimizer.empty_steps, optimizer.nonfinite_steps) == (3, 0, 0)
    optimizer.step()  # without a gradient nobody is asked
    assert len(asked) == 3 and optimizer.empty_steps == 1


def test_five_in_a_row_stop_naming_the_tensor():
    model = Net()
    optimizer = Optimizer(model, OptimConfig())
    for attempt in range(5):
        fill_grads(model, attempt)
        model.norm.weight.grad[2] = math.nan
        model.norm.bias.grad[0] = math.inf
        if attempt < 4:
            optimizer.step()
    with pytest.raises(TrainingDiverged, match="5 non-finite.*'norm.weight'"):
        optimizer.step()
    assert TrainingDiverged.exit_code == 4


@pytest.mark.parametrize("kind", ["none", "zero"])
def test_without_signal_nothing_moves(kind):
    model = Net()
    optimizer = Optimizer(model, OptimConfig(lr=0.1, weight_decay=0.1))
    fill_grads(model, 0)
    optimizer.step()
    before = digest(model, optimizer)
    if kind == "zero":
        fill_grads(model, 0, scale=0.0)
    guards = {"guard/nonfinite": 0.0, "guard/spike": 0.0}
    assert optimizer.step() == {"grad_norm": 0.0, "lr": 0.1, "skipped": 1.0, **guards}
    assert digest(model, optimizer) == before
    assert (optimizer.empty_steps, optimizer.nonfinite_steps) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype):
    config = OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=3, steps=20, schedule="cosine")

    def advance(model, optimizer, steps):
        for step in steps:
            fill_grads(model, step)
            if step < 6:
                model.mid.bias.grad = None  # this one starts to train late
            if step % 7 == 4:
                model.norm.bias.grad[0] = math.nan
            optimizer.step()

    straight = Net(dtype)
    straight_optimizer = Optimizer(straight, config)
    advance(straight, straight_optimizer, range(20))
    for cut in (0, 1, 5, 12):
        first = Net(dtype)
        first_optimizer = Optimizer(first, config)
        advance(first, first_optimizer, range(cut))
        tensors = {n: t.clone() for n, t in first_optimizer.state_tensors().items()}
        second = Net(dtype, seed=99)
        second_optimizer = Optimizer(second, config)
        second_optimizer.load(tensors, first_optimizer.state_json())
        assert digest(second, second_optimizer) == digest(first, first_optimizer)
        advance(second, second_optimizer, range(cut, 20))
        assert digest(second, second_optimizer) == digest(straight, straight_optimizer)
        assert second_optimizer.state_json() == straight_optimizer.state_json()


def test_load_names_what_does_not_fit_and_changes_nothing():
    model = Net()
    optimizer = Optimizer(model, OptimConfig())
    fill_grads(model, 0)
    optimizer.step()
    tensors, state = optimizer.state_tensors(), optimizer.state_json()
    tensors = {n: t.clone() for n, t in tensors.items()}
    before = digest(model, optimizer)
    broken = {
        "exp_avg/mid.bias": {**tensors, "exp_avg/mid.bias": torch.zeros(7)},
        "master/norm.weight": {**tensors, "master/norm.weight": torch.ones(6).double()},
        "master/extra": {**tensors, "master/extra": torch.zeros(1)},
        "exp_avg_sq/norm.bias": {n: t for n, t in tensors.items() if n != "exp_avg_sq/norm.bias"},
    }
    for name, bad in broken.items():
        with pytest.raises(CheckpointError, match=name):
            optimizer.load(bad, state)
    with pytest.raises(CheckpointError, match="'gone'"):
        optimizer.load(tensors, {**state, "updates": {"gone": 1}})
    assert digest(model, optimizer) == before


def test_bf16_gradients_of_many_micro_batches_add_up_in_fp32():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = Optimizer(model, OptimConfig(max_grad_norm=1e6))
    for gradient in [256.0] + [0.5] * 100:  # in bf16 the sum would stay 256: its spacing is 2
        (model.weight * gradient).sum().backward()
        optimizer.accumulate()
    assert optimizer.step()["grad_norm"] == 306.0


@pytest.mark.parametrize("cast_bytes", [1, 5000, 2**26])
@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e6])
def test_a_single_micro_batch_needs_no_fp32_sum(monkeypatch, cast_bytes, max_grad_norm):
    """Cast a few at a time as the weights move, the same bits as cast all at once before."""
    monkeypatch.setattr("fastsd.training.optimizer._CAST_BYTES", cast_bytes)
    results = []
    for summed in (False, True):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(24, 24).bfloat16() for _ in range(4)] + [torch.nn.Linear(24, 3)]
        model = torch.nn.ModuleList(layers)
        optimizer = Optimizer(model, OptimConfig(max_grad_norm=max_grad_norm, weight_decay=0.1))
        for _ in range(3):
            x = torch.randn(5, 24).bfloat16()
            for layer in layers[:-1]:
                x = layer(x).tanh()
            optimizer.accumulate()
            layers[-1](x.float()).square().sum().backward()
            if summed:
                optimizer.accumulate()
            metrics = optimizer.step()
            assert all(p.grad is None for p in model.parameters())
            assert all(m.grad is None for m in optimizer.masters.values())
        results.append((metrics, optimizer.state_tensors(), dict(model.named_parameters())))
    (metrics, state, weights), (other_metrics, other_state, other_weights) = results
    assert metrics == other_metrics and state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
