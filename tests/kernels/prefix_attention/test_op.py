"""The public call: operators under opcheck and compile, dispatch, autocast, and what is refused."""

from __future__ import annotations

import pytest
import torch
from prefix_attention_cases import TREES, attend, inputs, step
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastsd_kernels import native_library
from fastsd_kernels.prefix_attention import (
    PrefixTree,
    dispatch,
    implementation_name,
    op,
    shared_prefix_attention,
)
from fastsd_kernels.testing import relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "impl, dtype",
    [
        ("torch", torch.float64),
        ("torch", torch.bfloat16),
        ("native", torch.float32),
        ("native", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["depth 3", "outside, deep", "nothing below"])
def test_opcheck(name, impl, dtype):
    tree = TREES[name]
    x = [tensor.to(dtype).requires_grad_() for tensor in inputs(tree, 2, 1, 8)]
    x += [None] * (5 - len(x))
    arguments = (tree.segments, tree.outside, 0.3, impl)
    opcheck(op.prefix_attention, (*x, *arguments))
    constants = [None if tensor is None else tensor.detach() for tensor in x]
    out, lse = op.prefix_attention(*constants, *arguments)
    opcheck(op.prefix_attention_backward, (out, *constants, out, lse, *arguments))


def test_compiles_as_one_graph_for_every_layout():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ([5, 2, 3], [6, 4, 1, 2], [9, 1, 1]):
        tree = PrefixTree(lengths, [None] + [0] * (len(lengths) - 1))
        x = [tensor.requires_grad_() for tensor in inputs(tree)]
        found, exact = compiled(x, tree), attend(x, tree)
        assert torch.equal(found, exact)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["torch", "native"])
def test_aot_compiled_gradients_are_the_same(dtype):
    tree = TREES["outside, deep"]
    x = [tensor.to(dtype).requires_grad_() for tensor in inputs(tree)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, exact = (torch.autograd.grad((f(x, tree) ** 2).sum(), x) for f in (compiled, attend))
    assert all(map(torch.equal, found, exact))


def test_checkpointing_gives_the_same_gradients():
    tree = TREES["group"]
    x = [tensor.requires_grad_() for tensor in inputs(tree)]
    out = checkpoint(attend, x, tree, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    found = torch.autograd.grad(out.square().sum(), x)
    assert all(map(torch.equal, found, torch.autograd.grad(attend(x, tree).square().sum(), x)))


def test_a_tree_built_without_gradients_serves_with_them():
    with torch.inference_mode():
        tree = PrefixTree([3, 2], [None, 0])
        attend(inputs(tree), tree)
    assert torch.isfinite(step(inputs(tree), tree, torch.float64)[1]).all()


def test_autocast_casts_once():
    tree = TREES["outside, deep"]
    x = [tensor.float() for tensor in inputs(tree)]
    x[2] = x[2].bfloat16()  # as rotary embeddings in fp32 leave them
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(x, tree)
        reference = attend(x, tree, impl="reference")
    assert found.dtype == reference.dtype == torch.bfloat16
    assert torch.equal(found, attend([tensor.bfloat16() for tensor in x], tree))
    assert torch.equal(reference, attend([y.bfloat16() for y in x], tree, impl="reference"))


def test_autocast_leaves_fp64_and_hides_no_error():
    tree = TREES["group"]
    x = inputs(tree)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(x, tree).dtype == torch.float64
        with pytest.raises(TypeError, match="key_TNH: expected a tensor, got NoneType"):
            shared_prefix_attention(x[0].float(), None, x[2].float(), tree)
        with pytest.raises(TypeError, match="value_TNH: expected floating point"):
            shared_prefix_attention(x[0].float(), x[1].float(), x[2].int(), tree)


def test_operators_take_no_name_that_they_do_not_run():
    tree = TREES["group"]
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=f"'torch' or 'flash_attn', got '{impl}'"):
            op.prefix_attention(*inputs(tree), None, None, tree.segments, 0, 0.3, impl)


def test_second_derivatives_are_refused_and_the_reference_has_them():
    tree = TREES["group"]
    x = [tensor.requires_grad_() for tensor in inputs(tree)]
    with pytest.raises(RuntimeError, match="create_graph=True; leave create_graph out"):
        torch.autograd.grad(attend(x, tree).square().sum(), x, create_graph=True)
    out = attend(x, tree, impl="reference").square().sum()
    first = torch.autograd.grad(out, x, create_graph=True)
    assert torch.autograd.grad(first[0].sum(), x[0])[0].abs().sum() > 0


def test_auto_takes_the_fastest_that_can_run(monkeypatch):
    assert implementation_name("auto", CPU, torch.bfloat16, 64) == "native"
    assert implementation_name("auto", CPU, torch.float16, 64) == "torch"
    monkeypatch.setattr(native_library, "missing", lambda instead: f"not built, {instead}")
    assert implementation_name("auto", CPU, torch.bfloat16, 64) == "torch"
    with pytest.raises(RuntimeError, match="'native' cannot run: not built, use impl='torch'"):
        implementation_name("native", CPU, torch.bfloat16, 64)


def test_auto_on_other_devices():
    assert implementation_name("auto", torch.device("meta"), torch.float32, 64) == "reference"
    cuda = torch.device("cuda")
    assert implementation_name("auto", cuda, torch.float32, 64) == "reference"
    assert implementation_name("auto", cuda, torch.bfloat16, 60) == "reference"
    assert implementation_name("auto", cuda, torch.bfloat16, 64) in ("flash_attn", "torch")
    assert implementation_name("torch", cuda, torch.bfloat16, 64) == "torch"


@pytest.mark.parametrize(
    "impl, device, dtype, head_dim, message",
    [
        ("native", "cuda", torch.float32, 64, "runs on CPUs, these tensors are on cuda"),
        ("native", "cpu", torch.float64, 64, "takes fp32 or bf16, not torch.float64"),
        ("flash_attn", "cpu", torch.bfloat16, 64, "needs CUDA tensors, these are on cpu"),
        ("torch", "meta", torch.float32, 64, "needs CUDA tensors, these are on meta"),
        ("torch", "cuda", torch.float32, 64, "take bf16 or fp16, not torch.float32"),
        ("torch", "cuda", torch.bfloat16, 264, "head dims up to 256 in steps of 8, not 264"),
        ("torch", "cuda", torch.bfloat16, 60, "in steps of 8, not 60"),
    ],
)
def test_an_explicit_choice_never_falls_back(impl, device, dtype, head_dim, message):
    with pytest.raises(RuntimeError, match=message):
        implementation_name(impl, torch.device(device), dtype, head_dim)


def test_flash_attn_missing_is_said(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'flash_attn'")

    package = dispatch.kernel("flash_attn", torch.device("cuda"))
    monkeypatch.setattr(package, "_package", missing)
    with pytest.raises(RuntimeError, match="No module named 'flash_attn'; pip install flash-attn"):
        implementation_name("flash_attn", torch.device("cuda"), torch.bfloat16, 64)
    assert implementation_name("auto", torch.device("cuda"), torch.bfloat16, 64) == "torch"


TREE = PrefixTree([4, 2], [None, 0])
ABOVE = PrefixTree([4, 2], [None, 0], outside=1)
Q, K = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
BRANCH_Q, BRANCH_K, PREFIX = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8), torch.zeros(4, 2, 8)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((Q, K, K, [4, 2]), {}, TypeError, "tree: expected a PrefixTree, got list"),
        ((None, K, K, TREE), {}, TypeError, "query_TNH: expected a tensor, got NoneType"),
        ((Q, K, None, TREE), {}, TypeError, "value_TNH: expected a tensor, got NoneType"),
        ((Q[None], K, K, TREE), {}, ValueError, r"query_TNH: .* got shape \(1, 6, 4, 8\)"),
        ((Q, K[0], K, TREE), {}, ValueError, r"key_TNH: .* got shape \(2, 8\)"),
        ((Q[..., :0], K, K, TREE), {}, ValueError, r"query_TNH: .* got shape \(6, 4, 0\)"),
        ((Q.int(), K, K, TREE), {}, TypeError, "query_TNH: expected floating point.*int32"),
        ((Q, K.double(), K, TREE), {}, TypeError, "key_TNH: expected torch.float32 like query"),
        ((Q, K, K.to("meta"), TREE), {}, ValueError, "value_TNH: expected device cpu"),
        ((Q, Q[:, :3], Q[:, :3], TREE), {}, ValueError, "key_TNH: .* divides the query's 4, got 3"),
        ((Q, K[:, :0], K, TREE), {}, ValueError, r"key_TNH: .* got shape \(6, 0, 8\)"),
        ((Q, K[:5], K, TREE), {}, ValueError, r"key_TNH: expected shape \(6, 2, 8\), got \(5"),
        ((Q, K, Q, TREE), {}, ValueError, r"value_TNH: expected shape \(6, 2, 8\), got \(6, 4"),
        ((Q[1:], K[1:], K[1:], TREE), {}, ValueError, "query_TNH: expected 6 rows, .* got 5"),
        ((Q, K, K, TREE), {"scale": 0.0}, ValueError, "scale: expected a positive finite"),
        ((Q, K, K, TREE), {"scale": float("nan")}, ValueError, "scale: .* got nan"),
        ((Q, K, K, TREE), {"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
        ((Q, K, K, TREE), {"impl": "fast"}, ValueError, "impl: expected one of auto, .* 'fast'"),
        ((Q, K, K, TREE), {"prefix_key_PNH": PREFIX}, ValueError, "prefix_value_PNH: missing"),
        ((BRANCH_Q, BRANCH_K, BRANCH_K, ABOVE), {}, ValueError, "prefix_key_PNH: missing; 1 seg"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        shared_prefix_attention(*arguments, **options)


@pytest.mark.parametrize(
    "tree, prefix, message",
    [
        (PrefixTree([2], [None]), PREFIX, "prefix_key_PNH: given, but no segment .* from outside"),
        (ABOVE, PREFIX[1:], "prefix_key_PNH: expected 4 rows, .* got 3"),
        (ABOVE, PREFIX[:, :1], r"prefix_key_PNH: expected shape \(4, 2, 8\), got \(4, 1, 8\)"),
    ],
)
def test_bad_prefixes(tree, prefix, message):
    with pytest.raises(ValueError, match=message):
        attend([BRANCH_Q, BRANCH_K, BRANCH_K, prefix, prefix], tree)


def test_nothing_is_repeated_and_no_mask_is_made(monkeypatch):
    """The kernel reads the pack's own keys: every tensor it gets is a view of an input."""
    seen = []
    kernel = dispatch.kernel("torch", CPU)
    forward = kernel.forward

    def watched(query, key, value, *rest):
        seen.append({tensor.untyped_storage().data_ptr() for tensor in (query, key, value)})
        return forward(query, key, value, *rest)

    monkeypatch.setattr(kernel, "forward", watched)
    tree = TREES["outsides"]
    x = [tensor.float() for tensor in inputs(tree)]
    out = attend(x, tree, impl="torch")
    monkeypatch.undo()
    storages = {tensor.untyped_storage().data_ptr() for tensor in x}
    assert seen and all(call <= storages for call in seen)
    assert relative_error(out, attend(x, tree, impl="reference")) < 2e-6
