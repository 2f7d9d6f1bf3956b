"""CUDA: torch's flash kernels and the flash-attn package against fp64 on the CPU.

These have not run yet: no machine so far had a GPU. The plan they share is tested on the CPU in
test_varlen.py.
"""

from __future__ import annotations

import pytest
import torch
from prefix_attention_cases import LONG, TREES, check, inputs, step

from fastsd_kernels.prefix_attention import dispatch
from fastsd_kernels.testing import poisoned_empty

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["torch", "flash_attn"])
def impl(request):
    try:
        dispatch.implementation_name(request.param, torch.device("cuda"), torch.bfloat16, 64)
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


def _on_gpu(x, tree, impl, dtype=torch.bfloat16):
    return [y.cpu() for y in step([tensor.cuda() for tensor in x], tree, dtype, impl)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tree", [*TREES.values(), LONG], ids=[*TREES, "long"])
def test_every_tree(tree, head_dim, impl):
    x = inputs(tree, head_dim=head_dim)
    with poisoned_empty():
        found = _on_gpu(x, tree, impl)
    check(found, step(x, tree, torch.float64, "reference"), torch.bfloat16)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (9, 3)])
def test_grouped_heads(heads, kv_heads, impl):
    x = inputs(LONG, heads, kv_heads, 64)
    check(_on_gpu(x, LONG, impl), step(x, LONG, torch.float64, "reference"), torch.bfloat16)


def test_auto_in_fp32_is_the_definition():
    tree = TREES["outsides"]
    x = inputs(tree)
    exact = step(x, tree, torch.float64, "reference")
    check(_on_gpu(x, tree, "auto", torch.float32), exact, torch.float32)


def test_same_bits_with_deterministic_algorithms(impl):
    x = inputs(LONG, 4, 2, 64)
    with poisoned_empty():  # switches them on
        first, second = (_on_gpu(x, LONG, impl) for _ in range(2))
    assert all(map(torch.equal, first, second))
