"""Output and all gradients against the fp64 definition; mutants of the merge must fail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from instruction_sets import run, runs_here
from prefix_attention_cases import BF16_ROUNDING, LONG, TREES, attend, check, inputs, step

from fastsd_kernels.prefix_attention import PrefixTree, cpu_flash, merged, shared_prefix_attention
from fastsd_kernels.prefix_attention.reference import dense_mask
from fastsd_kernels.testing import poisoned_empty, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
FAST = [("torch", dtype) for dtype in DTYPES] + [("native", dtype) for dtype in DTYPES[1:]]
GROUPS = [(4, 4), (4, 2), (4, 1), (9, 3), (1, 1)]


@pytest.mark.parametrize("impl, dtype", FAST, ids=str)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_every_tree(tree, impl, dtype):
    x = inputs(tree)
    exact = step(x, tree, torch.float64, "reference")
    with poisoned_empty():
        check(step(x, tree, dtype, impl), exact, dtype)


@pytest.mark.parametrize("impl, dtype", FAST, ids=str)
@pytest.mark.parametrize("heads, kv_heads", GROUPS)
def test_grouped_heads(heads, kv_heads, impl, dtype):
    tree = TREES["outside, deep"]
    x = inputs(tree, heads, kv_heads)
    check(step(x, tree, dtype, impl), step(x, tree, torch.float64, "reference"), dtype)


@pytest.mark.parametrize("impl, dtype", FAST, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128, 256])
def test_head_dims(head_dim, impl, dtype):
    tree = TREES["outsides"]
    x = inputs(tree, head_dim=head_dim)
    check(step(x, tree, dtype, impl), step(x, tree, torch.float64, "reference"), dtype)


@pytest.mark.parametrize("impl, dtype", FAST[:2] + FAST[3:4], ids=str)
def test_head_dim_of_one(impl, dtype):
    x = inputs(LONG, head_dim=1)
    check(step(x, LONG, dtype, impl), step(x, LONG, torch.float64, "reference"), dtype)


@pytest.mark.parametrize("impl, dtype", FAST, ids=str)
def test_more_than_a_block(impl, dtype):
    x = inputs(LONG, 2, 1, 64)
    check(step(x, LONG, dtype, impl), step(x, LONG, torch.float64, "reference"), dtype)


@pytest.mark.parametrize("impl, dtype", [("torch", torch.float64), ("native", torch.float32)])
@pytest.mark.parametrize("scale", [0.03, 1.0, 2])
def test_scale(scale, impl, dtype):
    tree = TREES["outside, deep"]
    x = inputs(tree)
    exact = step(x, tree, torch.float64, "reference", scale=scale)
    check(step(x, tree, dtype, impl, scale=scale), exact, dtype)
    assert relative_error(exact[0], step(x, tree, torch.float64, "reference")[0]) > 0.01


@pytest.mark.parametrize(
    "impl, dtype, error", [("torch", torch.float64, 1e-11), ("native", torch.float32, 5e-4)]
)
def test_large_scores(impl, dtype, error):
    """Scores of some hundreds: one part's weight is 0 or 1 for most rows."""
    tree = TREES["depth 3"]
    x = inputs(tree)
    exact = step(x, tree, torch.float64, "reference", scale=50.0)
    found = step(x, tree, dtype, impl, scale=50.0)
    assert all(torch.isfinite(part).all() for part in found)
    # The rounding of scores, of some hundreds of units, is what reaches the weights.
    assert max(relative_error(a, b) for a, b in zip(found, exact, strict=True)) < error


def test_no_tokens():
    tree = PrefixTree([3, 0], [None, 0], outside=1)
    for impl in ("native", "torch", "reference"):
        out, *gradients = step(inputs(tree), tree, torch.float32, impl)
        assert out.shape == (0, 4, 16)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_bf16_errs_no_more_than_torch_without_sharing(impl):
    """Against scaled_dot_product_attention on full rows, prefix repeated, in the same precision."""
    tree, prefix, branch, branches = PrefixTree([64, 32, 32], [None, 0, 0]), 64, 32, 2
    x = inputs(tree, 4, 2, 64)
    exact = step(x, tree, torch.float64, "reference")
    leaves = [tensor.bfloat16().requires_grad_() for tensor in x]
    own = torch.arange(branch)
    rows = torch.stack(
        [torch.cat([torch.arange(prefix), prefix + b * branch + own]) for b in range(branches)]
    )
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(leaf[rows].transpose(1, 2) for leaf in leaves), is_causal=True, enable_gqa=True
    )
    packed = torch.cat([whole[0, :, :prefix], *whole[:, :, prefix:]], 1).transpose(0, 1)
    upstream = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    unshared = [packed.detach(), *torch.autograd.grad(packed, leaves, upstream)]
    found = step(x, tree, torch.bfloat16, impl)
    for mine, theirs, true in zip(found, unshared, exact, strict=True):
        # One more rounding, of the parts.
        assert relative_error(mine, true) < relative_error(theirs, true) + BF16_ROUNDING


@pytest.mark.parametrize("name", ["depth 3", "outsides", "outside below outside"])
def test_gradcheck(name):
    tree = TREES[name]
    x = [tensor.requires_grad_() for tensor in inputs(tree, 2, 1, 3)]
    assert torch.autograd.gradcheck(lambda *y: attend(list(y), tree), x)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 4), (3,)])
def test_gradients_of_some(wanted):
    tree = TREES["outside, deep"]
    x = inputs(tree)
    every = step(x, tree, torch.float64)[1:]
    leaves = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(x)]
    out = attend(leaves, tree)
    g = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=g).bfloat16().double())
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) if i not in wanted else torch.equal(leaf.grad, every[i])


def test_prefix_from_outside_equals_the_same_prefix_inside():
    """The prefix's own queries aside, a tree says the same with its root inside or outside."""
    inside, outside = (PrefixTree([8, 3, 5], [None, 0, 0], outside=n) for n in (0, 1))
    q, k, v = (x.requires_grad_() for x in inputs(inside))
    whole = shared_prefix_attention(q, k, v, inside)[8:]
    split = attend([q[8:], k[8:], v[8:], k[:8], v[:8]], outside)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(whole.shape, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad(x, (q, k, v), upstream) for x in (whole, split)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_any_strides():
    """Slices of a fused projection, transposed tensors, an expanded upstream gradient."""
    tree = TREES["questions"]
    fused = torch.randn(tree.tokens, 8, 16, dtype=torch.float64)
    q, k, v = fused.split([4, 2, 2], 1)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in (q, k, v)]
    plain = [x.contiguous().requires_grad_() for x in (q, k, v)]
    for leaves in (turned, plain):
        out = shared_prefix_attention(*leaves, tree)
        assert out.is_contiguous()
        out.sum().backward()  # its upstream gradient is one number, expanded
    reference = shared_prefix_attention(*plain, tree, impl="reference")
    exact = torch.autograd.grad(reference.sum(), plain)
    for a, b, true in zip(turned, plain, exact, strict=True):
        assert torch.equal(a.grad, b.grad)
        torch.testing.assert_close(a.grad, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("impl, dtype", FAST, ids=str)
def test_same_bits_every_run(impl, dtype):
    x = inputs(LONG, 2, 1, 64)
    first = step(x, LONG, dtype, impl)
    for _ in range(3):
        assert all(map(torch.equal, first, step(x, LONG, dtype, impl)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tree", [LONG, TREES["questions"], TREES["outside below outside"]])
def test_native_has_the_same_bits_on_any_number_of_threads(tree, dtype):
    x = inputs(tree, 6, 2, 40)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(step(x, tree, dtype, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    "instruction_set",
    ["avx2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("avx512", "scalar"))],
)
def test_native_on_every_instruction_set(instruction_set):
    """The same comparisons in a process of their own: the choice is made once a process."""
    if not runs_here(instruction_set):
        pytest.skip(f"this processor has no {instruction_set}")
    names = ("every_tree", "grouped_heads", "head_dims", "more_than_a_block")
    tests = [f"{__file__}::test_{name}" for name in names]
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native")
    found = run(instruction_set, *options, *tests)
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(found.stdout.rsplit(" passed")[0].split()[-1]) > 50


@pytest.mark.parametrize("impl, dtype", FAST, ids=str)
def test_questions_do_not_touch_each_other(impl, dtype):
    """A question's results are the same bits wherever in a pack it stands."""
    lengths, parents = [6, 3, 5], [None, 0, 0]
    other, other_parents = [4, 2], [None, 0]
    alone = PrefixTree(lengths, parents)
    last = PrefixTree(other + lengths, other_parents + [None, 2, 2])
    first = PrefixTree(lengths + other, parents + [None, 3])
    x, y = inputs(alone), inputs(PrefixTree(other, other_parents), seed=5)
    results = []
    for tree, tensors, rows in (
        (alone, x, slice(0, 14)),
        (last, [torch.cat([b, a]) for a, b in zip(x, y, strict=True)], slice(6, 20)),
        (first, [torch.cat([a, b]) for a, b in zip(x, y, strict=True)], slice(0, 14)),
    ):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        out = attend(leaves, tree, impl=impl)
        (out[rows].float() ** 2).sum().backward()
        results.append([out[rows].detach(), *(leaf.grad[rows] for leaf in leaves)])
    for other_result in results[1:]:
        assert all(map(torch.equal, results[0], other_result))


def test_unseen_tokens_do_not_matter():
    """What a token does not see may be anything, infinities too; here the last branch."""
    tree = TREES["group"]
    x = inputs(tree)
    clean = attend(x, tree)
    for tensor in x[1:]:
        tensor[-1] = float("inf")
    assert torch.equal(attend(x, tree)[:-1], clean[:-1])


def test_the_mask_is_the_tree():
    seen = dense_mask(PrefixTree([1, 1, 2, 1, 1], [None, None, 0, 2, None], outside=2)).int()
    #                       prefixes | segment 2 | segment 3 | segment 4
    assert seen.tolist() == [
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def _own(part, call, scale) -> dict:
    return dict(zip(("out_CNH", "lse_CN"), cpu_flash.forward(*part[1:4], call, scale), strict=True))


def _own_lse(part, call, scale):
    return cpu_flash.backward(part._replace(**_own(part, call, scale)), call, scale)


def _own_lse_only(part, call, scale):
    own = _own(part, call, scale)
    return cpu_flash.backward(part._replace(lse_CN=own["lse_CN"]), call, scale)


def _own_out_only(part, call, scale):
    own = _own(part, call, scale)
    return cpu_flash.backward(part._replace(out_CNH=own["out_CNH"]), call, scale)


@pytest.mark.parametrize("mutant", [None, _own_lse, _own_lse_only, _own_out_only])
def test_backward_needs_the_merged_output_and_lse(mutant):
    """Each part's own in place of the merged one, as composing autograd calls does, is found."""
    tree = TREES["depth 3"]
    tensors = inputs(tree)
    exact = step(tensors, tree, torch.float64, "reference")
    packed = merged.Tensors(*tensors, tensors[1][:0], tensors[1][:0])
    calls = cpu_flash.calls(tree, torch.device("cpu"))
    out, lse = merged.forward(cpu_flash, packed, calls, 0.25)
    kernel = SimpleNamespace(backward=mutant or cpu_flash.backward)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = merged.backward(kernel, upstream.double(), packed, out, lse, calls, 0.25)
    worst = max(relative_error(a, b) for a, b in zip(found[:3], exact[1:], strict=True))
    assert worst < 1e-13 if mutant is None else worst > 1e-2
