"""The CUDA plan on a CPU: variable-length kernels emulated, the real ones on fake tensors.

The emulations keep the kernels' conventions: runs by cumulative lengths, a causal mask aligned at
the bottom right, lse [N, rows], a backward formed from the out and lse it is given.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from prefix_attention_cases import LONG, TREES, check, inputs, random_tree, step
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsd_kernels.prefix_attention import cuda_flash, flash_attn_package, merged, plan
from fastsd_kernels.prefix_attention.contract import Part

CPU = torch.device("cpu")


def _runs(starts_q, starts_k, longest_q, longest_k):
    """(query rows, key rows) of each run, checked as strictly as a kernel that reads past ends."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and len(starts_q) == len(starts_k)
    ends = [starts.tolist() for starts in (starts_q, starts_k)]
    runs = [[slice(a, b) for a, b in zip(e, e[1:], strict=False)] for e in ends]
    assert all(0 < r.stop - r.start <= longest_q for r in runs[0])
    assert all(0 < r.stop - r.start <= longest_k for r in runs[1])
    return list(zip(*runs, strict=True))


def _scores(query, key, causal, scale):
    repeat = query.shape[1] // key.shape[1]
    scores_NQL = torch.einsum("qnh,lnh->nql", query, key.repeat_interleave(repeat, 1)) * scale
    rows, columns = scores_NQL.shape[1:]
    seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    return scores_NQL.masked_fill(~seen, float("-inf")) if causal else scores_NQL


def _forward(query, key, value, starts_q, starts_k, longest_q, longest_k, causal, scale):
    out = torch.full_like(query, float("nan"))
    lse_NC = query.new_full((query.shape[1], query.shape[0]), float("nan"))
    repeat = query.shape[1] // key.shape[1]
    for rows, columns in _runs(starts_q, starts_k, longest_q, longest_k):
        scores = _scores(query[rows], key[columns], causal, scale)
        wide_value = value[columns].repeat_interleave(repeat, 1)
        out[rows] = torch.einsum("nql,lnh->qnh", scores.softmax(-1), wide_value)
        lse_NC[:, rows] = scores.logsumexp(-1)
    return out, lse_NC


def _backward(
    grad, query, key, value, out, lse_NC, starts_q, starts_k, longest_q, longest_k, causal, scale
):
    assert lse_NC.is_contiguous() and lse_NC.shape == (query.shape[1], query.shape[0])
    d_query, d_key, d_value = (torch.full_like(x, float("nan")) for x in (query, key, value))
    repeat = query.shape[1] // key.shape[1]
    for rows, columns in _runs(starts_q, starts_k, longest_q, longest_k):
        scores = _scores(query[rows], key[columns], causal, scale)
        weights = (scores - lse_NC[:, rows, None]).exp()
        wide_value = value[columns].repeat_interleave(repeat, 1)
        d_weights = torch.einsum("qnh,lnh->nql", grad[rows], wide_value)
        delta_NQ = (grad[rows] * out[rows]).sum(-1).T
        d_scores = weights * (d_weights - delta_NQ[..., None]) * scale
        wide_key = key[columns].repeat_interleave(repeat, 1)
        d_query[rows] = torch.einsum("nql,lnh->qnh", d_scores, wide_key)
        per_head = torch.einsum("nql,qnh->lnh", d_scores, query[rows])
        d_key[columns] = per_head.unflatten(1, (-1, repeat)).sum(2)
        per_head = torch.einsum("nql,qnh->lnh", weights, grad[rows])
        d_value[columns] = per_head.unflatten(1, (-1, repeat)).sum(2)
    return d_query, d_key, d_value


def _aten_forward(q, k, v, sq, sk, nq, nk, dropout_p, causal, debug_mask, *, scale):
    assert dropout_p == 0.0 and debug_mask is False
    return *_forward(q, k, v, sq, sk, nq, nk, causal, scale), None, None, None


def _aten_backward(g, q, k, v, o, lse, sq, sk, nq, nk, dropout_p, causal, state, unused, *, scale):
    assert dropout_p == 0.0 and state.numel() == 0
    return _backward(g, q, k, v, o, lse, sq, sk, nq, nk, causal, scale)


def _package_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
):
    assert dropout_p == 0.0
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *_forward(q, k, v, *packing, causal, softmax_scale), None, None


def _package_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, deterministic,
):  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
    assert alibi_slopes is None and deterministic is False
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    found = _backward(dout, q, k, v, out, softmax_lse, *packing, causal, softmax_scale)
    for target, gradient in zip((dq, dk, dv), found, strict=True):
        target.copy_(gradient)


@pytest.fixture(params=["cuda_flash", "flash_attn_package"])
def kernel(request, monkeypatch):
    if request.param == "cuda_flash":
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", _aten_forward)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", _aten_backward)
        return cuda_flash
    package = SimpleNamespace(
        _flash_attn_varlen_forward=_package_forward, _flash_attn_varlen_backward=_package_backward
    )
    monkeypatch.setattr(flash_attn_package, "_package", lambda: package)
    return flash_attn_package


def _both_ways(kernel, tensors, tree, device=CPU):
    """Output and gradients through `kernel`, as the operators run it."""
    none = tensors[1][:0]
    packed = merged.Tensors(*tensors, *[none] * (5 - len(tensors)))
    scale = tensors[0].shape[2] ** -0.5
    calls = kernel.calls(tree, device)
    out, lse = merged.forward(kernel, packed, calls, scale)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=g).bfloat16().to(out)
    gradients = merged.backward(kernel, upstream, packed, out, lse, calls, scale)
    return [out, *gradients[: len(tensors)]]


@pytest.mark.parametrize("tree", [*TREES.values(), LONG], ids=[*TREES, "long"])
def test_every_tree_by_levels(tree, kernel):
    x = inputs(tree)
    exact = step(x, tree, torch.float64, "reference")
    check(_both_ways(kernel, x, tree), exact, torch.float64)


def test_random_trees_by_levels(kernel):
    for seed in range(20):
        tree = random_tree(seed)
        x = inputs(tree, 2, 1, 4)
        exact = step(x, tree, torch.float64, "reference")
        check(_both_ways(kernel, x, tree), exact, torch.float64)


def test_runs_apart_are_gathered_and_adjacent_ones_are_not():
    own, below = plan.level_calls(TREES["questions"], CPU)
    assert own.queries == own.keys == slice(0, 29)
    assert below.queries.tolist() == [*range(6, 14), *range(16, 21)]
    assert below.keys.tolist() == [*range(6), 14, 15]
    assert below.packing.query_starts.tolist() == [0, 8, 13]
    assert (below.packing.longest_query, below.packing.longest_key) == (8, 6)


def test_the_real_cuda_operators_take_the_arguments():
    """On fake CUDA tensors: argument order, types and shapes, as far as torch's own fakes check."""
    with FakeTensorMode():
        q, k, v = (
            torch.empty(rows, heads, 64, dtype=torch.bfloat16, device="cuda")
            for rows, heads in ((10, 4), (7, 2), (7, 2))
        )
        starts = torch.empty(3, dtype=torch.int32, device="cuda")
        packing = plan.Packing(starts, starts, 6, 5)
        call = plan.Call(slice(0, 10), slice(0, 7), False, False, packing)
        out, lse = cuda_flash.forward(q, k, v, call, 0.1)
        found = cuda_flash.backward(Part(out, q, k, v, out, lse), call, 0.1)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (10, 4), torch.float32)
    assert [gradient.shape for gradient in found] == [q.shape, k.shape, v.shape]
