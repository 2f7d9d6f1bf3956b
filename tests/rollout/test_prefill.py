"""Prompts that begin alike: in the network once, and to the bit what each is by itself."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import build_tiny, load_tiny

from fastsd.errors import FastsdError
from fastsd.model.packed_layers import packed_layers
from fastsd.model.packing import PrefixKeys
from fastsd.rollout.prefill import BLOCK, PromptTree, prompt_trees
from fastsd.types import Branch, TokenTree


def begin_alike(seed: int, count: int = 9) -> list[tuple[int, ...]]:
    """Prompts that fork at many places; one twice, one the beginning of another, one by itself."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(10, 290) for _ in range(rng.randrange(1, 4 * BLOCK)))]
    while len(prompts) < count:
        base = rng.choice(prompts)[: rng.randrange(4 * BLOCK)]
        tail = rng.randrange(1, 2 * BLOCK)
        prompts.append(base + tuple(rng.randrange(10, 290) for _ in range(tail)))
    longest = max(prompts, key=len)
    return [*prompts, prompts[1], longest[: BLOCK + 3], longest[:BLOCK], (5,)]


def tree_of(prompts) -> PromptTree:
    (tree,) = prompt_trees(prompts, most_tokens=10**9)
    return tree


def run(policy, prompts, joined=False):
    """hidden_PD, and per prompt its keys and values of both layers, [L, ...]."""
    pack, rows_of_prompt = tree_of(prompts).pack(joined)
    keys = PrefixKeys()
    with torch.no_grad(), packed_layers(policy):
        hidden_PD = policy.run(pack, fills=keys)
    parts = [
        torch.cat([x[rows_P].flatten(1) for layer in keys.layers.values() for x in layer], 1)
        for rows_P in rows_of_prompt
    ]
    return hidden_PD, parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_bits_do_not_depend_on_the_others(folder, dtype, seed):
    policy = load_tiny(folder, dtype)
    assert policy.attention_name == "native"
    prompts = begin_alike(seed)
    hidden_PD, parts = run(policy, prompts)
    for index, prompt in enumerate(prompts):
        alone_1D, (part,) = run(policy, [prompt])
        assert torch.equal(alone_1D[0], hidden_PD[index]) and torch.equal(part, parts[index])
    reverse_PD, _ = run(policy, prompts[::-1])
    assert torch.equal(reverse_PD.flip(0), hidden_PD)


@pytest.mark.parametrize("joined", [False, True])
def test_it_is_what_whole_prompts_are(folder, joined):
    policy = load_tiny(folder)
    prompts = begin_alike(5)
    hidden_PD, parts = run(policy, prompts, joined)
    keys = PrefixKeys()
    with torch.no_grad():
        want_PD = policy.hidden([TokenTree(p, (Branch((), (1,)),)) for p in prompts], fills=keys)
    torch.testing.assert_close(hidden_PD, want_PD, rtol=0, atol=1e-12)
    rows = torch.cat([x.flatten(1) for layer in keys.layers.values() for x in layer], 1)
    torch.testing.assert_close(torch.cat(parts), rows, rtol=0, atol=1e-12)


def test_each_block_is_there_once():
    prompts = begin_alike(7)
    tree = tree_of(prompts)
    beginnings = {p[: at + BLOCK] for p in prompts for at in range(0, len(p), BLOCK)}
    assert tree.tokens == sum((len(b) - 1) % BLOCK + 1 for b in beginnings) < sum(map(len, prompts))
    pack, rows_of_prompt = tree.pack(joined=False)
    assert len(pack.segments.lengths) == len(beginnings) and len(pack.ids_T) == tree.tokens
    assert max(pack.segments.lengths) == BLOCK
    for joined in (False, True):
        pack, rows_of_prompt = tree.pack(joined)
        positions = pack.segments.position_of_T
        for prompt, rows_P, last in zip(prompts, rows_of_prompt, pack.row_A, strict=True):
            assert tuple(pack.ids_T[rows_P].tolist()) == prompt and rows_P[-1] == last
            assert positions[rows_P].tolist() == list(range(len(prompt)))
    forks = len({p[:BLOCK] for p in prompts})
    assert forks <= len(pack.segments.lengths) < len(beginnings)


def test_trees_hold_few_enough_tokens():
    prompts = begin_alike(8, count=30)
    for most in (1, 100, 300, 1000):
        trees = prompt_trees(prompts, most)
        assert [len(tree.pack(False)[1]) for tree in trees] and all(
            tree.tokens <= most or len(tree.pack(False)[1]) == 1 for tree in trees
        )
        found = [
            tuple(pack.ids_T[rows_P].tolist())
            for pack, rows in (tree.pack(True) for tree in trees)
            for rows_P in rows
        ]
        assert found == prompts
    tree = PromptTree()
    for prompt in prompts:
        before, missing = tree.tokens, tree.missing(prompt)
        tree.add(prompt)
        assert tree.tokens - before == missing and tree.missing(prompt) == 0


def test_a_prompt_has_tokens():
    with pytest.raises(FastsdError, match="without tokens"):
        PromptTree().add(())
