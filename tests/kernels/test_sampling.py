"""Draws from logits and from hidden states: the distribution, both implementations, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd_kernels import native_library, sample_from_logits, sample_tokens

DRAWS = pytest.mark.parametrize("impl", ["native", "torch"])


@DRAWS
def test_draws_follow_the_distribution(impl):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, generator=generator)
    head, bias = torch.randn(7, 4, generator=generator), torch.randn(7, generator=generator)
    count = 40_000
    uniforms = torch.from_numpy((np.arange(count) + 0.5) / count)
    options = {"bias_V": bias, "temperature": 0.8, "logit_scale": 1.5, "softcap": 3.0}
    products = (hidden @ head.T).expand(count, -1).clone()
    token, logprob = sample_from_logits(products, uniforms, impl=impl, **options)
    logits = 3.0 * torch.tanh((hidden @ head.T + bias) * 1.5 / 3.0) / 0.8
    want = logits.log_softmax(-1)[0]
    # Evenly spaced uniforms: each token's count is its probability times `count`, give or take one.
    counts = torch.bincount(token, minlength=7)
    assert (counts - want.exp() * count).abs().max() <= 1.01
    torch.testing.assert_close(logprob, want[token], rtol=1e-5, atol=1e-6)
    again = sample_tokens(hidden.expand(count, -1), head, uniforms, **options)
    assert (again[0] == token).float().mean() > 0.999  # but for the rounding of the boundaries


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33, 1023, 1024, 1025, 5000])
def test_native_draws_are_those_of_the_exact_distribution(columns):
    generator = torch.Generator().manual_seed(columns)
    logits = 4 * torch.randn(200, columns, generator=generator)
    logits[::7, : columns // 2] = -torch.inf
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-53
    token, logprob = sample_from_logits(logits.clone(), uniforms, impl="native")
    want = logits.double().log_softmax(-1)
    upper = want.exp().cumsum(-1).gather(1, token[:, None])[:, 0]
    own = want.gather(1, token[:, None])[:, 0]
    # The drawn token's interval of cumulative mass holds the uniform number, to fp32's rounding.
    assert (uniforms <= upper + 1e-5).all() and (uniforms >= upper - own.exp() - 1e-5).all()
    torch.testing.assert_close(logprob.double(), own, rtol=1e-6, atol=1e-6)
    alone = [sample_from_logits(logits[i : i + 1].clone(), uniforms[i : i + 1]) for i in range(9)]
    assert torch.equal(torch.cat([x[0] for x in alone]), token[:9])
    assert torch.equal(torch.cat([x[1] for x in alone]), logprob[:9])


def test_native_shows_what_is_not_a_number():
    logits = torch.zeros(4, 20)
    logits[0, 3], logits[1, 19], logits[2] = torch.nan, torch.inf, -torch.inf
    token, logprob = sample_from_logits(logits, torch.full((4,), 0.5), impl="native")
    assert logprob.isnan().tolist() == [True, True, True, False]
    assert token.tolist() == [0, 0, 0, 10]


@DRAWS
def test_zero_mass_is_never_drawn(impl):
    logits = torch.tensor([[-1e9, 0.0, -1e9]]).repeat(3, 1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    token, _ = sample_from_logits(logits, uniforms, impl=impl)
    assert token.tolist() == [1, 1, 1]


def test_a_named_draw_never_falls_back(monkeypatch):
    logits, uniforms = torch.zeros(1, 4), torch.zeros(1)
    with pytest.raises(RuntimeError, match="without top_k and top_p; use impl='torch'"):
        sample_from_logits(logits, uniforms, top_k=2, impl="native")
    monkeypatch.setattr(native_library, "missing", lambda instead: f"not built, {instead}")
    with pytest.raises(RuntimeError, match="cannot run: not built, use impl='torch'"):
        sample_from_logits(logits, uniforms, impl="native")
    with pytest.raises(ValueError, match="expected 'auto', 'native' or 'torch', got 'triton'"):
        sample_from_logits(logits, uniforms, impl="triton")


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.randn(9, 40)
    logits[:, [31, 7]] = 9.0
    token, _ = sample_from_logits(logits, torch.rand(9, dtype=torch.float64), top_k=1)
    assert token.tolist() == [7] * 9


def test_top_k_and_top_p_keep_what_they_say():
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    hidden, head = torch.ones(1000, 1), probs.log()[:, None]
    uniforms = torch.linspace(0, 0.999999, 1000, dtype=torch.float64)
    kept = {
        (2, 1.0): {0, 1}, (0, 0.5): {0, 1}, (0, 0.4): {0}, (0, 0.75): {0, 1, 2},
        (3, 0.99): {0, 1, 2}, (1, 1.0): {0}, (99, 1.0): {0, 1, 2, 3},
    }  # fmt: skip
    for (top_k, top_p), want in kept.items():
        token, logprob = sample_tokens(hidden, head, uniforms, top_k=top_k, top_p=top_p)
        assert set(token.tolist()) == want, (top_k, top_p)
        torch.testing.assert_close(logprob, probs.log()[token])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_BD": torch.ones(2, 3)}, "hidden_BD and head_VD"),
        ({"uniform_B": torch.ones(3)}, "uniform_B"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_sample_tokens_refuses(change, message):
    arguments = {
        "hidden_BD": torch.ones(2, 4),
        "head_VD": torch.ones(5, 4),
        "uniform_B": torch.ones(2) / 2,
    }
    with pytest.raises(ValueError, match=message):
        sample_tokens(**{**arguments, **change})
