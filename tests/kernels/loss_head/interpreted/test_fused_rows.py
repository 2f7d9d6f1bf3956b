"""The row kernels themselves: elementary functions, batch invariance, launch arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton_interpreter import patched_once, require_interpreter, rounded_bf16

require_interpreter()

from fastsd_kernels.loss_head.contract import Inputs, Options  # noqa: E402
from fastsd_kernels.loss_head.triton import elementary, finish  # noqa: E402
from fastsd_kernels.loss_head.triton import scratch as scratch_kernels  # noqa: E402
from fastsd_kernels.loss_head.triton.finish import RESULTS, finish_rows  # noqa: E402
from fastsd_kernels.loss_head.triton.row_kernels import COEFFICIENTS  # noqa: E402
from fastsd_kernels.loss_head.triton.scratch import (  # noqa: E402
    Scratch,
    entry_sums,
    row_gradients,
    row_sums,
)

V, BLOCK = 150, 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(
        scratch_kernels, "row_config", lambda capability, kernel: {"BLOCK": BLOCK, "num_warps": 4}
    )
    with rounded_bf16(), patched_once():
        yield


@triton.jit
def apply(x, y, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, at < n, 0.0)
    if NAME == "tanh":
        value = elementary.tanh(value)
    elif NAME == "expm1":
        value = elementary.expm1(value)
    else:
        value = elementary.log1p(value)
    tl.store(y + at, value, at < n)


@pytest.mark.parametrize(
    "name, low, high", [("tanh", -20, 20), ("expm1", -80, 80), ("log1p", -0.999, 1e6)]
)
def test_elementary_functions_to_a_few_ulps(name, low, high):
    small = torch.logspace(-30, 0, 2000)
    x = torch.cat([small, -small, torch.linspace(low, high, 4096), torch.zeros(1)])
    x = x[(x >= low) & (x <= high)]
    found = torch.empty_like(x)
    size = triton.next_power_of_2(len(x))
    apply[(1,)](x, found, len(x), NAME=name, BLOCK=size)
    exact = getattr(torch, name)(x.double())
    error = (found.double() - exact).abs() / exact.abs().clamp(min=1e-37)
    # 4 u: the last rounding, and one or two before it that are not damped.
    assert float(error.max()) <= 4 * 2**-24
    assert found[-1] == 0


def random_rows(rows: int, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    target = torch.randint(0, V, (rows,), generator=generator)
    return Inputs(
        normal(rows, V), normal(1, 1), target, normal(V), normal(rows, V), None,
        normal(rows).abs(), normal(rows), -normal(rows).abs(), normal(rows).abs(),
    )  # fmt: skip


def evaluate_rows(inputs: Inputs, options: Options) -> tuple[torch.Tensor, ...]:
    """Sums, results and gradient of rows whose logits stand in for the hidden states."""
    assert inputs.teacher_TD is not None
    rows = inputs.student_TD.shape[0]
    scratch = Scratch(inputs.student_TD, inputs.teacher_TD, inputs.bias_V)
    sums, entries = torch.empty(rows, 9), torch.empty(rows, 5)
    results, coefficients = torch.empty(len(RESULTS), rows), torch.empty(rows, COEFFICIENTS.value)
    gradient = torch.empty(rows, V)
    row_sums(scratch, inputs.target_T, options, sums)
    jsd = options.divergence == "jsd"
    if jsd:
        entry_sums(scratch, options, sums, entries)
    finish_rows(
        sums, inputs, options, results, entries_TE=entries if jsd else None,
        coefficients_TC=coefficients,
    )  # fmt: skip
    row_gradients(scratch, inputs, options, coefficients, gradient)
    return sums, results.T.contiguous(), gradient


def selected(inputs: Inputs, index: torch.Tensor) -> Inputs:
    by_row = ("_TD", "_T")
    return Inputs(
        **{
            name: value if value is None or not name.endswith(by_row) else value[index].contiguous()
            for name, value in vars(inputs).items()
        }
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("splits", [4, pytest.param(500, marks=pytest.mark.slow)])
def test_bits_of_a_row_do_not_depend_on_its_batch(divergence, splits):
    generator = torch.Generator().manual_seed(3)
    inputs, options = random_rows(12, generator), Options(divergence=divergence, clip=0.2)
    whole = evaluate_rows(inputs, options)
    for _ in range(splits):
        order = torch.randperm(12, generator=generator)
        cut = int(torch.randint(1, 12, (1,), generator=generator))
        index = order[:cut]
        for found, expected in zip(
            evaluate_rows(selected(inputs, index), options), whole, strict=True
        ):
            assert torch.equal(found, expected[index])


def run_programs(monkeypatch, module, ids: list[int], asked: list[int]) -> None:
    """Makes launches run only the programs `ids`; `asked` notes how many they wanted."""
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    def place(x, y, z):
        interpreter_builder.grid_idx = (ids[x], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", place)
    # Arguments are in host memory already: copying them back would touch every page of them.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    launch = scratch_kernels.launch

    def launch_some(kernel, programs, *arguments, **constants):
        asked.append(programs)
        assert max(ids) < programs
        launch(kernel, len(ids), *arguments, **constants)

    monkeypatch.setattr(module, "launch", launch_some)


def sparse(elements: int, path: Path) -> torch.Tensor:
    """fp32 zeros in a file of which only touched pages exist."""
    with path.open("wb") as file:
        file.truncate(elements * 4)
    return torch.from_file(str(path), shared=True, size=elements)


@pytest.mark.parametrize(
    "rows, stride",
    [(200_001, 192), (36, 1 << 26)],
    ids=["T > 65,535", "T * stride > 2^31"],
)
def test_rows_far_away(rows, stride, monkeypatch, tmp_path):
    """The first and the last rows of a scratch too large to run whole, against a small one."""
    ids = [0, rows // 3, rows - 2, rows - 1]
    assert rows > 65_535 or (rows - 2) * stride > 1 << 31
    few, options = random_rows(4, torch.Generator().manual_seed(1)), Options(divergence="jsd")
    expected = evaluate_rows(few, options)
    assert few.teacher_TD is not None
    matrices = []
    for small in (few.student_TD, few.teacher_TD, torch.zeros(4, V)):
        path = tmp_path / str(len(matrices))
        large = sparse(rows * stride, path).view(rows, stride)[:, :V]
        large[ids] = small
        matrices.append(large)
    student, teacher, gradient = matrices
    vectors = {}
    for name in ("target_T", "divergence_weight_T", "policy_weight_T", "old_logprob_T",
                 "entropy_weight_T"):  # fmt: skip
        value = getattr(few, name)
        vectors[name] = value.new_zeros(rows)
        vectors[name][ids] = value
    inputs = Inputs(student, few.head_VD, bias_V=few.bias_V, teacher_TD=teacher, **vectors)
    scratch = Scratch(student, teacher, few.bias_V)
    sums, entries = torch.ones(rows, 9), torch.zeros(rows, 5)
    results, coefficients = torch.empty(len(RESULTS), rows), torch.empty(rows, COEFFICIENTS.value)
    asked: list[int] = []
    with monkeypatch.context() as patch:
        run_programs(patch, scratch_kernels, ids, asked)
        row_sums(scratch, inputs.target_T, options, sums)
        entry_sums(scratch, options, sums, entries)
    blocks = sorted({row // 128 for row in ids})
    with monkeypatch.context() as patch:
        run_programs(patch, finish, blocks, asked)
        finish_rows(
            sums, inputs, options, results, entries_TE=entries, coefficients_TC=coefficients
        )
    with monkeypatch.context() as patch:
        run_programs(patch, scratch_kernels, ids, asked)
        row_gradients(scratch, inputs, options, coefficients, gradient)
    assert asked == [rows, rows, -(-rows // 128), rows]
    found = sums[ids], results.T[ids], gradient[ids]
    for value, small in zip(found, expected, strict=True):
        assert torch.equal(value, small)


def test_grids_have_one_axis(monkeypatch):
    """CUDA's second and third axes end at 65,535 programs."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    scratch_kernels.launch(Kernel(), 200_000, 1, BLOCK=64)
    assert grids == [(200_000,)]
