"""The packed linear layer against fp64: ragged shapes, strides, bias; bits by row and thread.

A sum of K products in fp32, and the bias, is off by (K + 2) u of the absolute terms at most, with
u = 2^-24; a result in bf16 by 2^-8 of itself more.
Shapes: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from c_probe import needs_compiler, printed

from fastsd_kernels import PackedLinear, native_library
from fastsd_kernels.native_library import instruction_set

BF16, FP32 = torch.bfloat16, torch.float32
needs_library = pytest.mark.skipif(not instruction_set(), reason="library not built")
pytestmark = needs_library
# Both sides of every block: 14 rows (AVX-512), 6, 4; 32 columns, 16, 8; 128 and 1,024 words of k;
# 8 KB of a panel, which is as far as it is fetched ahead.
SHAPES = [
    (1, 1, 1), (3, 2, 1), (1, 33, 33), (14, 32, 2), (15, 31, 129), (29, 65, 63), (43, 96, 128),
    (2, 100, 127), (5, 16, 257), (6, 8, 300), (7, 7, 2049), (64, 192, 576), (200, 40, 77),
]  # fmt: skip


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def check(y, x, weight_NK, bias_N=None) -> None:
    x, weight_NK = x.double(), weight_NK.double()
    bias_N = torch.zeros(1) if bias_N is None else bias_N
    exact = x @ weight_NK.mT + bias_N.double()
    terms = x.abs() @ weight_NK.mT.abs() + bias_N.double().abs()
    bound = (x.shape[-1] + 2) * 2**-24 * terms
    if y.dtype == BF16:
        bound = bound + 2**-8 * (exact.abs() + bound)
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("bias_dtype", [None, FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shapes(shape, dtype, bias_dtype):
    m, n, k = shape
    x, weight_NK = normal(m, k, dtype=dtype), normal(n, k, seed=1, dtype=dtype)
    bias_N = None if bias_dtype is None else normal(n, seed=2, dtype=bias_dtype)
    linear = PackedLinear(weight_NK, bias_N)
    for out_dtype in (None, FP32, BF16):
        y = linear(x, out_dtype)
        assert y.dtype == (out_dtype or dtype)
        check(y, x, weight_NK, bias_N)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_strides(dtype):
    """Weights and rows from inside other tensors, and transposed ones."""
    wide, turned = normal(40, 90, dtype=dtype), normal(50, 40, dtype=dtype).mT
    x = normal(7, 90, seed=1, dtype=dtype)
    for weight_NK in (
        wide[:, 20:70],
        wide[::3, 20:70],
        turned,
        normal(50, dtype=dtype).expand(4, 50),
    ):
        linear = PackedLinear(weight_NK)
        expected = linear(x[:, 30:80].contiguous())
        check(expected, x[:, 30:80], weight_NK)
        assert torch.equal(linear(x[:, 30:80]), expected)
        assert torch.equal(linear(x.mT.contiguous().mT[:, 30:80]), expected)
        assert torch.equal(linear(x[None, :, None, 30:80]), expected[None, :, None])
        assert torch.equal(linear(x[2, 30:80]), expected[2])
        assert torch.equal(linear(x[:1, 30:80].expand(3, 50)), expected[:1].expand(3, -1))
        assert linear(x[:0, 30:80]).shape == (0, weight_NK.shape[0])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_row_has_the_same_bits_anywhere(dtype, threads):
    """In any batch, at any place in it, on any number of threads."""
    linear = PackedLinear(normal(100, 300, dtype=dtype), normal(100))
    x = normal(64, 300, seed=1, dtype=dtype)
    whole = linear(x, FP32)
    assert all(torch.equal(linear(x[i : i + 1], FP32)[0], whole[i]) for i in range(64))
    for m in range(2, 64):
        threads(1 + m % 4)
        assert torch.equal(linear(x[64 - m :], FP32), whole[64 - m :]), m


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_what_is_not_a_number_stays_in_its_row_and_column(dtype):
    x, weight_NK = normal(20, 33, dtype=dtype), normal(50, 33, seed=1, dtype=dtype)
    x[3, 32], weight_NK[7, 0] = torch.nan, torch.inf
    found = PackedLinear(weight_NK)(x).isfinite()
    expected = torch.ones(20, 50, dtype=torch.bool)
    expected[3], expected[:, 7] = False, False
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_repack(dtype):
    weight_NK = normal(33, 20, dtype=dtype).requires_grad_()
    bias_N, x = normal(33), normal(3, 20, seed=1, dtype=dtype)
    linear = PackedLinear(weight_NK, bias_N)
    for changed in (weight_NK, bias_N):
        before = linear(x)
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="weight_NK or bias_N has changed .* call repack"):
            linear(x)
        linear.repack()
        check(linear(x), x, weight_NK.detach(), bias_N)
        assert not torch.equal(linear(x), before)
    with torch.inference_mode():
        made_here = PackedLinear(weight_NK * 1, bias_N)
        assert torch.equal(made_here(x), linear(x))


def test_gradients_are_refused():
    linear, x = PackedLinear(normal(4, 3)), normal(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="x: PackedLinear has no gradient; use torch.no_grad"):
        linear(x)
    with torch.no_grad():
        check(linear(x), x, normal(4, 3))


def test_errors_name_the_argument(monkeypatch):
    def refused(kind, text, call, *args):
        with pytest.raises(kind, match=text):
            call(*args)

    weight_NK = normal(4, 3)
    refused(ValueError, r"weight_NK: expected \[N, K\], got \[3\]", PackedLinear, weight_NK[0])
    refused(ValueError, r"weight_NK: .* got \[0, 3\]", PackedLinear, weight_NK[:0])
    refused(
        TypeError, "weight_NK: .*float64 on cpu; use torch.nn", PackedLinear, weight_NK.double()
    )
    refused(TypeError, "weight_NK: .* on meta", PackedLinear, weight_NK.to("meta"))
    refused(ValueError, r"bias_N: expected \[4\], got \[3\]", PackedLinear, weight_NK, normal(3))
    linear = PackedLinear(weight_NK)
    refused(TypeError, "x: expected torch.float32 on the CPU, got torch.bfloat16", linear,
            normal(2, 3).bfloat16())  # fmt: skip
    refused(TypeError, "x: .*on meta", linear, normal(2, 3).to("meta"))
    refused(ValueError, r"x: expected \[..., 3\], got \[2, 4\]", linear, normal(2, 4))
    refused(ValueError, r"x: expected \[..., 3\], got \[\]", linear, torch.tensor(1.0))
    refused(TypeError, "out_dtype: expected float32 or bfloat16, got torch.float16", linear,
            normal(2, 3), torch.float16)  # fmt: skip
    monkeypatch.setattr(native_library, "library", lambda: None)
    refused(RuntimeError, "PackedLinear cannot run: .*install g.*use torch.nn.functional.linear",
            PackedLinear, weight_NK)  # fmt: skip


def test_no_memory_is_an_error():
    linear = PackedLinear(normal(4, 3))
    problem = native_library.Linear.from_buffer_copy(linear._problem)
    problem.m = 1 << 44
    with pytest.raises(MemoryError, match="out of memory in fastsd_linear"):
        native_library.call("linear", problem)


@needs_compiler
def test_structs_are_those_of_the_header(tmp_path):
    structs = {
        "FastsdLinear": native_library.Linear,
        "FastsdDecode": native_library.Decode,
        "FastsdPrefix": native_library.Prefix,
    }
    lines, expected = [], {}
    for name, kind in structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected[name] = [ctypes.sizeof(kind)]
        for field, *_ in kind._fields_:
            place = f"offsetof({name}, {field}), sizeof((({name}*)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
            expected[f"{name}.{field}"] = [getattr(kind, field).offset, getattr(kind, field).size]
    assert printed(tmp_path, lines) == expected
