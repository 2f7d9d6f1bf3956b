"""The sampler against Hugging Face generate, against the training forward, and against itself."""

import numpy as np
import pytest
import torch
from tiny_models import build_tiny_llama, build_tiny_qwen3

from fastsd.config import ModelConfig, PromptConfig, RolloutConfig
from fastsd.model import load_policy
from fastsd.render import PromptRenderer
from fastsd.rollout import Sampler, row_counters, uniform
from fastsd.types import Branch, FastsdError, Prompt, TokenTree
from fastsd_kernels import sample_tokens

QUESTIONS = ["What is 3 + 4?", "Tom has 12 apples and finds 7.", "x", "Now solve the problem. " * 3]
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": q},)) for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def policy(request, tmp_path_factory):
    build = {"llama": build_tiny_llama, "qwen3": build_tiny_qwen3}[request.param]
    folder = build(tmp_path_factory.mktemp(request.param))
    policy = load_policy(ModelConfig(name=str(folder)), "cpu", torch.float32)
    with torch.no_grad():  # random tiny models are near uniform: sharpen, so that stops do occur
        policy.head_VD.mul_(8.0)
    return policy


def sampler(policy, **options):
    # Random models rarely stop: let every letter end a response, so that lengths differ.
    options = {"max_new_tokens": 24, "stop": list("abcdefghijklmnop"), **options}
    return Sampler(
        policy, PromptRenderer(policy.tokenizer, PromptConfig()), RolloutConfig(**options)
    )


def test_same_rollouts_whatever_the_batching(policy):
    together = sampler(policy).sample(PROMPTS, 5, key=(1, 2))
    small = sampler(policy, batch_rows=5).sample(PROMPTS, 5, key=(1, 2))
    alone = [r for p in PROMPTS for r in sampler(policy).sample([p], 5, key=(1, 2))]
    fewer = [r for r in sampler(policy).sample(PROMPTS, 2, key=(1, 2))]
    ids = [r.response_ids for r in together]
    assert [r.response_ids for r in small] == ids == [r.response_ids for r in alone]
    assert [r.response_ids for r in fewer] == [r.response_ids for r in together if r.sample < 2]
    assert [(r.prompt.id, r.sample) for r in together] == [
        (p.id, s) for p in PROMPTS for s in range(5)
    ]
    assert len({len(i) for i in ids}) > 1, "lengths must differ, or compaction is not tested"
    other = sampler(policy).sample(PROMPTS, 5, key=(1, 3))
    assert [r.response_ids for r in other] != ids


def test_logprobs_equal_the_training_forward(policy):
    rollouts = sampler(policy, temperature=0.7).sample(PROMPTS, 6, key=(0,))
    renderer = PromptRenderer(policy.tokenizer, PromptConfig())
    for rollout in rollouts:
        tree = TokenTree(renderer.student(rollout.prompt), (Branch((), rollout.response_ids),))
        logits = policy.hidden([tree]) @ policy.head_VD.T / 0.7
        want = logits.log_softmax(-1)[range(len(rollout.response_ids)), rollout.response_ids]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), want, rtol=1e-4, atol=1e-4)


def test_stops_and_truncation(policy):
    rollouts = sampler(policy).sample(PROMPTS, 16, key=(4,))
    stop = sampler(policy).stop_ids
    assert {r.truncated for r in rollouts} == {True, False}
    for rollout in rollouts:
        assert stop.isdisjoint(rollout.response_ids[:-1])
        assert rollout.truncated == (rollout.response_ids[-1] not in stop)
        assert len(rollout.response_ids) == len(rollout.logprobs) <= 24
        assert rollout.truncated <= (len(rollout.response_ids) == 24)
        assert "<|im_end|>" not in rollout.text


def test_greedy_limit_equals_generate(policy):
    """top_k = 1 leaves one token: the argmax that `generate` takes."""
    rollouts = sampler(policy, top_k=1, stop=[]).sample(PROMPTS, 2, key=(0,))
    renderer = PromptRenderer(policy.tokenizer, PromptConfig())
    for rollout in rollouts:
        ids = torch.tensor([renderer.student(rollout.prompt)])
        want = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )[0, ids.shape[1] :]
        assert list(rollout.response_ids) == want.tolist()


def test_extra_stop_tokens(policy):
    plain = sampler(policy, stop=[]).stop_ids
    assert len(sampler(policy, stop=["<|im_start|>"]).stop_ids) == 1 + len(plain)
    with pytest.raises(FastsdError, match="rollout.stop: 'not a token'"):
        sampler(policy, stop=["not a token"])


def test_uniform_numbers_are_uniform_and_independent_of_order():
    counters = row_counters((3, 1), PROMPTS, 1000)
    draws = np.stack([uniform(counters, position) for position in range(8)])
    assert draws.min() >= 0 and draws.max() < 1
    # 32,000 draws: mean 1/2 and lag correlations 0 within five standard errors.
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / draws.size**0.5
    centred = (draws - 0.5) * 12**0.5
    for pairs in (centred[:-1] * centred[1:], centred[:, :-1] * centred[:, 1:]):
        assert abs(pairs.mean()) < 5 / pairs.size**0.5
    again = row_counters((3, 1), PROMPTS[::-1], 1000).reshape(len(PROMPTS), 1000)[::-1]
    assert (again.reshape(-1) == counters).all()


def test_sample_tokens_follows_the_distribution():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, generator=generator)
    head, bias = torch.randn(7, 4, generator=generator), torch.randn(7, generator=generator)
    count = 40_000
    uniforms = torch.from_numpy((np.arange(count) + 0.5) / count)
    options = {"bias_V": bias, "temperature": 0.8, "logit_scale": 1.5, "softcap": 3.0}
    token, logprob = sample_tokens(hidden.expand(count, -1), head, uniforms, **options)
    logits = 3.0 * torch.tanh((hidden @ head.T + bias) * 1.5 / 3.0) / 0.8
    want = logits.log_softmax(-1)[0]
    # Evenly spaced uniforms: each token's count is its probability times `count`, give or take one.
    counts = torch.bincount(token, minlength=7)
    assert (counts - want.exp() * count).abs().max() <= 1.01
    torch.testing.assert_close(logprob, want[token], rtol=1e-5, atol=1e-6)


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


def test_zero_mass_is_never_drawn():
    head = torch.tensor([[-1e9], [0.0], [-1e9]])
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    token, _ = sample_tokens(torch.ones(3, 1), head, uniforms)
    assert token.tolist() == [1, 1, 1]


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
