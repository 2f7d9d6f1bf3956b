"""The sampler against Hugging Face generate, against the training forward, and against itself."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from given_draws import Draws
from tiny_models import ARCHITECTURES, build_tiny

import fastsd.model.policy
import fastsd.rollout.sampler
from fastsd.config.sections import ModelConfig, PromptConfig, RolloutConfig
from fastsd.errors import FastsdError
from fastsd.model import load_policy
from fastsd.model.packed_layers import packed_layers, packed_layers_name
from fastsd.prompts.render import PromptRenderer
from fastsd.rollout import Sampler
from fastsd.rollout.decode_steps import AllSlots
from fastsd.rollout.decoding import Decoding
from fastsd.rollout.sampler import row_counters, uniform
from fastsd.types import Branch, Prompt, TokenTree
from fastsd_kernels import PackedLinear, PrefixDecodeCache, native_library

QUESTIONS = ["What is 3 + 4?", "Tom has 12 apples and finds 7.", "x", "Now solve the problem. " * 3]
# Windows as long as a model's positions: none of these rows is cut.
LONG = {"sliding_window": 2048}
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": q},)) for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request, tmp_path_factory):
    folder = build_tiny(request.param, tmp_path_factory.mktemp(request.param), **LONG)
    return load_policy(ModelConfig(name=str(folder)), "cpu", torch.float32)


def sampler(policy, **options):
    # Random models rarely stop: let every letter end a response, so that lengths differ.
    options = {"max_new_tokens": 24, "stop": list("abcdefghijklmnop"), **options}
    return Sampler(
        policy, PromptRenderer(policy.tokenizer, PromptConfig()), RolloutConfig(**options)
    )


def name(rollout):
    return rollout.prompt.id, rollout.sample


def same(policy, found, wanted):
    """To the bit; where torch's grouped products run the experts, up to their rounding."""
    if policy.config.model_type == "qwen3_moe":
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.logprobs == pytest.approx(theirs.logprobs, rel=1e-5)
        found, wanted = ([replace(r, logprobs=()) for r in x] for x in (found, wanted))
    assert found == wanted


def drawn(sampler, given=None):
    """Rollouts and their draws, which may be those of another implementation (given_draws.py)."""
    draws = Draws(given and given.tokens)
    with draws.installed():
        return sampler.sample(PROMPTS, 5, key=(1, 2)), draws


def watch_packs(policy, monkeypatch):
    """What the sampler's prefills put through the network, from now on."""
    packs, run = [], policy.run
    monkeypatch.setattr(policy, "run", lambda pack, **kw: packs.append(pack) or run(pack, **kw))
    return packs


@pytest.mark.parametrize("rows", [1, 5, 7, 10, 64])
def test_same_rollouts_whatever_the_batching(policy, rows):
    """Rows one question at a time, admitted to rows that others left, or all at once."""
    together = sampler(policy).sample(PROMPTS, 5, key=(1, 2))
    same(policy, sampler(policy, batch_rows=rows).sample(PROMPTS, 5, key=(1, 2)), together)
    assert len({len(r.response_ids) for r in together}) > 1, "lengths must differ"


def test_prefills_hold_few_enough_tokens(policy, monkeypatch):
    together = sampler(policy).sample(PROMPTS, 2, key=(1, 2))
    monkeypatch.setattr("fastsd.rollout.decoding._PREFILL_TOKENS", 50)
    packs = watch_packs(policy, monkeypatch)
    same(policy, sampler(policy).sample(PROMPTS, 2, key=(1, 2)), together)
    assert len(packs) > 1 and all(len(p.ids_T) <= 50 or len(p.row_A) == 1 for p in packs)


def test_a_shared_instruction_is_prefilled_once(policy, monkeypatch):
    """Same bits with and without company, and whoever else is in it."""
    turns = [
        ({"role": "system", "content": "Judge each step. " * 30}, *p.messages) for p in PROMPTS
    ]
    prompts = [Prompt(f"i{i}", messages) for i, messages in enumerate(turns)]
    packs = watch_packs(policy, monkeypatch)
    together = sampler(policy).sample([*prompts, *PROMPTS], 2, key=(1, 2))
    computed = sum(len(pack.ids_T) for pack in packs)
    alone = [r for p in [*prompts, *PROMPTS] for r in sampler(policy).sample([p], 2, key=(1, 2))]
    assert 2 * computed < sum(len(pack.ids_T) for pack in packs) - computed
    same(policy, together, alone)


def test_a_draw_is_its_own(policy):
    together = sampler(policy).sample(PROMPTS, 5, key=(1, 2))
    assert [(r.prompt.id, r.sample) for r in together] == [
        (p.id, s) for p in PROMPTS for s in range(5)
    ]
    alone = [r for p in PROMPTS for r in sampler(policy).sample([p], 5, key=(1, 2))]
    same(policy, alone, together)
    fewer = sampler(policy).sample(PROMPTS[::-1], 2, key=(1, 2))
    same(policy, sorted(fewer, key=name), [r for r in together if r.sample < 2])
    other = sampler(policy).sample(PROMPTS, 5, key=(1, 3))
    assert [r.response_ids for r in other] != [r.response_ids for r in together]
    assert sampler(policy).sample([], 5, key=(1, 2)) == []


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("rows", [5, 12, 64])
def test_steps_of_all_slots_draw_the_same(policy, monkeypatch, impl, rows):
    """As on a GPU, where a step is one graph: slots that nobody needs are fed all the same."""
    together, draws = drawn(sampler(policy))
    monkeypatch.setattr(
        fastsd.rollout.sampler, "Decoding", lambda *args, fixed: Decoding(*args, fixed=True)
    )
    monkeypatch.setattr(
        fastsd.model.policy, "PrefixDecodeCache", partial(PrefixDecodeCache, impl=impl)
    )
    found, _ = drawn(sampler(policy, batch_rows=rows), draws)
    for mine, theirs in zip(found, together, strict=True):
        assert mine.response_ids == theirs.response_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, rel=1e-5)


def test_without_the_library(policy, monkeypatch):
    together, draws = drawn(sampler(policy))
    assert packed_layers_name(policy) == "native"
    monkeypatch.setattr(native_library, "missing", lambda instead="": "not built")
    assert packed_layers_name(policy) == "torch"
    found, _ = drawn(sampler(policy), draws)
    for mine, theirs in zip(found, together, strict=True):
        assert mine.response_ids == theirs.response_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, rel=1e-5)


def test_layers_are_as_before_after_a_failure(policy):
    before = {name: module.forward for name, module in policy.decoder.named_modules()}
    with pytest.raises(ZeroDivisionError), packed_layers(policy):
        packed = [m for m in policy.decoder.modules() if isinstance(m.forward, PackedLinear)]
        assert packed
        raise ZeroDivisionError
    assert {name: module.forward for name, module in policy.decoder.named_modules()} == before


@pytest.mark.gpu
def test_a_graph_draws_what_eager_steps_draw(policy, monkeypatch, tmp_path):
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    on_gpu = load_policy(ModelConfig(name=str(tmp_path)), "cuda", torch.bfloat16)
    found = sampler(on_gpu, batch_rows=12).sample(PROMPTS, 5, key=(1, 2))
    monkeypatch.setattr(AllSlots, "_replayed", AllSlots._run)
    eager = sampler(on_gpu, batch_rows=12).sample(PROMPTS, 5, key=(1, 2))
    assert [r.response_ids for r in found] == [r.response_ids for r in eager]


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
    draws = np.stack([uniform(counters, np.array([position])) for position in range(8)])
    assert draws.min() >= 0 and draws.max() < 1
    # 32,000 draws: mean 1/2 and lag correlations 0 within five standard errors.
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / draws.size**0.5
    centred = (draws - 0.5) * 12**0.5
    for pairs in (centred[:-1] * centred[1:], centred[:, :-1] * centred[:, 1:]):
        assert abs(pairs.mean()) < 5 / pairs.size**0.5
    again = row_counters((3, 1), PROMPTS[::-1], 1000).reshape(len(PROMPTS), 1000)[::-1]
    assert (again.reshape(-1) == counters).all()
