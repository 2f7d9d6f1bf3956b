"""The tile kernel's nine sums under Triton's interpreter (TRITON_INTERPRET=1) against fp64."""

from __future__ import annotations

import importlib.util
import mmap
import random
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear
from triton_interpreter import MemoryTracer, require_interpreter

require_interpreter()

from fastsd_kernels.loss_head.contract import Options  # noqa: E402
from fastsd_kernels.loss_head.triton import tile, tile_kernels  # noqa: E402
from fastsd_kernels.loss_head.triton.configs import TileConfig  # noqa: E402
from fastsd_kernels.testing import FP32_ERROR, FP32_ERROR_AT_SCALE_8, loss_head_inputs  # noqa: E402

# Linux's flag, which Python 3.11 has no name for.
_MAP_NORESERVE = 0x4000
COLUMNS = ("m_s", "S_s", "U_s", "E_s", "m_t", "S_t", "U_t", "y_s", "y_t")
SHAPES = [(1, 5, 63), (37, 24, 65)]
LARGER_SHAPES = [(5, 3, 1), (63, 16, 500), (130, 40, 129)]
OPTIONS = [
    {},
    {"temperature": 0.6},
    {"logit_scale": 8.0},
    {"softcap": 2.0, "temperature": 1.3, "logit_scale": 0.7},
]
# Tiles of 16 x 32 and splits of 64 columns: many blocks and splits in small shapes.
POINTERS = TileConfig(16, 32, 16, 2, 4, 2)
DESCRIPTORS = TileConfig(16, 32, 16, 1, 4, 2, TMA=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tile, "tile_config", lambda *_: POINTERS)
    monkeypatch.setattr(tile, "SPLIT_COLUMNS", 64)


@pytest.fixture(params=["pointers", "descriptors"])
def either(request, small_tiles, monkeypatch):
    """Tiles read in either way; descriptors only where they can describe the matrices."""

    def config(capability, dtype, accesses, streams):
        return DESCRIPTORS if "tma" in accesses and request.param == "descriptors" else POINTERS

    monkeypatch.setattr(tile, "tile_config", config)


def exact_products(x: dict) -> dict:
    """Matrices rounded to eighths: products are exact, in whatever order BLAS sums them up."""
    return {k: (v * 8).round() / 8 if k.endswith("D") else v for k, v in x.items()}


def tensors(rows, width, vocabulary, dtype=torch.float32, seed=0, own_width=None) -> dict:
    x = loss_head_inputs(rows, width, vocabulary, dtype, seed)
    names = ("student_TD", "head_VD", "target_T", "teacher_TD", "bias_V")
    found = {name: x[name].detach() for name in names}
    if own_width is not None:
        own = loss_head_inputs(rows, own_width, vocabulary, dtype, seed + 1)
        found |= {"teacher_TD": own["teacher_TD"], "teacher_head_VD": own["head_VD"].detach()}
    return found


def logits(x: dict, side: str, o: Options) -> torch.Tensor | None:
    hidden, head = x.get(f"{side}_TD"), x["head_VD"]
    if hidden is None:
        return None
    if side == "teacher" and x.get("teacher_head_VD") is not None:
        head = x["teacher_head_VD"]
    bias = None if x.get("bias_V") is None else x["bias_V"].double()
    z = linear(hidden.double(), head.double(), bias) * o.logit_scale
    z = z if o.softcap is None else o.softcap * torch.tanh(z / o.softcap)
    return z / o.temperature


def exact_values(x: dict, o: Options) -> dict[str, torch.Tensor]:
    """What the sums are for: log-normalisers, entropy, both KLs, picked logits; fp64."""
    z_s, z_t = logits(x, "student", o), logits(x, "teacher", o)
    l_s = z_s.log_softmax(-1)
    y = x["target_T"][:, None]
    found = {"LSE_s": z_s.logsumexp(-1), "H_s": -(l_s.exp() * l_s).sum(-1)}
    found["y_s"] = z_s.gather(1, y)[:, 0]
    if z_t is not None:
        l_t = z_t.log_softmax(-1)
        found |= {"LSE_t": z_t.logsumexp(-1), "y_t": z_t.gather(1, y)[:, 0]}
        found["KL(S||T)"] = (l_s.exp() * (l_s - l_t)).sum(-1)
        found["KL(T||S)"] = (l_t.exp() * (l_t - l_s)).sum(-1)
    return found


def finished(sums_T9: torch.Tensor, shift_T: torch.Tensor | None, teacher: bool) -> dict:
    """The same values from the sums, in fp32 as a caller has them."""
    s = dict(zip(COLUMNS, sums_T9.unbind(1), strict=True))
    found = {"LSE_s": s["m_s"] + s["S_s"].log(), "y_s": s["y_s"]}
    found["H_s"] = found["LSE_s"] - s["E_s"] / s["S_s"]
    if teacher:
        shift = 0 if shift_T is None else shift_T
        ratio = shift - (s["m_s"] - s["m_t"]) - (s["S_s"] / s["S_t"]).log()
        found |= {"LSE_t": s["m_t"] + s["S_t"].log(), "y_t": s["y_t"]}
        found["KL(S||T)"] = s["U_s"] / s["S_s"] + ratio
        found["KL(T||S)"] = -s["U_t"] / s["S_t"] - ratio
    return found


def check(x: dict, options: dict, shift_T=None) -> None:
    o = Options(**options)
    sums = tile.row_sums(**x, shift_T=shift_T, options=o)
    assert sums.dtype == torch.float32 and sums.shape == (x["student_TD"].shape[0], 9)
    exact = exact_values(x, o)
    budget = FP32_ERROR_AT_SCALE_8 if o.logit_scale == 8 else FP32_ERROR
    found = finished(sums, shift_T, x.get("teacher_TD") is not None)
    # A value near 0 made from logits of unit scale carries their rounding: measured against both.
    scale = exact["LSE_s"].abs() + 1
    for name, value in exact.items():
        off = (found[name].double() - value).norm() / (value.abs() + scale).norm()
        assert off <= budget, f"{name}: {off:.1e}"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in LARGER_SHAPES)], ids=str
)
def test_sums_match_fp64(either, shape, options):
    check(tensors(*shape), options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_products_are_exact(either, dtype):
    """fp64 starts from the same rounded inputs, so the budget stays that of fp32."""
    x = tensors(37, 24, 200, dtype)
    check(x, OPTIONS[-1])


@pytest.mark.parametrize("own_width", [8, 40])
def test_a_teacher_with_a_head_of_its_own(either, own_width):
    check(tensors(37, 24, 129, own_width=own_width), {"temperature": 1.5})


@pytest.mark.parametrize("shift", [False, True])
def test_without_a_teacher_its_columns_are_zero(shift):
    x = tensors(21, 24, 129)
    del x["teacher_TD"]
    check(x, {}, torch.ones(21) if shift else None)
    sums = tile.row_sums(**x, shift_T=torch.ones(21) if shift else None, options=Options())
    assert not sums[:, [2, 4, 5, 6, 8]].any()


def test_without_a_bias():
    x = tensors(21, 24, 129)
    del x["bias_V"]
    check(x, {})


def test_a_shift_keeps_what_an_offset_between_the_streams_would_cancel():
    x = tensors(21, 24, 150, own_width=24)
    ones = torch.ones(21, 1), torch.full((150, 1), 50.0)
    pad = [torch.zeros(n, 7) for n in (21, 150)]
    x["teacher_TD"] = torch.cat([x["teacher_TD"], ones[0], pad[0]], 1)
    x["teacher_head_VD"] = torch.cat([x["teacher_head_VD"], ones[1], pad[1]], 1)
    exact = exact_values(x, Options())
    error = {}
    for shift_T in (None, torch.full((21,), -50.0)):
        sums = tile.row_sums(**x, shift_T=shift_T, options=Options())
        found = finished(sums, shift_T, True)
        for name in ("KL(S||T)", "KL(T||S)"):
            off = (found[name].double() - exact[name]).norm() / exact[name].norm()
            error[name, shift_T is None] = off
    for name in ("KL(S||T)", "KL(T||S)"):
        assert error[name, False] < 0.5 * error[name, True]
    check(x, {}, torch.full((21,), -50.0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_streams_give_equal_columns_to_the_bit(either, options):
    x = tensors(37, 24, 200)
    x["teacher_TD"] = x["student_TD"].clone()
    sums = tile.row_sums(**x, options=Options(**options))
    assert torch.equal(sums[:, :2], sums[:, 4:6]) and torch.equal(sums[:, 7], sums[:, 8])
    assert not sums[:, 2].any() and not sums[:, 6].any()


def test_rows_do_not_depend_on_their_batch(either):
    x = exact_products(tensors(37, 24, 200))
    whole = tile.row_sums(**x, options=Options())
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:5], torch.tensor([36]), torch.arange(15, 33)):
        part = {k: v[rows] if k.endswith(("_TD", "_T")) else v for k, v in x.items()}
        assert torch.equal(tile.row_sums(**part, options=Options()), whole[rows])


def test_large_logits_stay_finite():
    x = tensors(7, 24, 129)
    sums = tile.row_sums(**x, options=Options(logit_scale=1e4))
    assert torch.isfinite(sums).all()
    check(x, {"softcap": 30.0, "logit_scale": 1e4})


def test_no_rows_and_strided_matrices():
    x = tensors(21, 24, 129)
    none = {k: v[:0] if k.endswith(("_TD", "_T")) else v for k, v in x.items()}
    assert tile.row_sums(**none, options=Options()).shape == (0, 9)
    whole = tile.row_sums(**x, options=Options())
    columns = {k: v.T.contiguous().T if k.endswith("D") else v for k, v in x.items()}
    assert torch.equal(tile.row_sums(**columns, options=Options()), whole)


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="student_TD: expected bfloat16.*got torch.float64"):
        tile.row_sums(**tensors(3, 4, 5, torch.float64), options=Options())
    x = tensors(3, 4, 5) | {"teacher_TD": torch.zeros(3, 4, dtype=torch.bfloat16)}
    with pytest.raises(TypeError, match="teacher_TD: .*like student_TD"):
        tile.row_sums(**x, options=Options())


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy between NaN (integers: the lowest); a matrix's rows have such gaps between them."""
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min
    stride = x.shape[1] + 16 if x.ndim == 2 else 1
    buffer = x.new_full((x.shape[0] * stride + 128,), poison)
    inner = buffer[64:].as_strided(x.shape, (stride, 1) if x.ndim == 2 else (1,))
    return inner.copy_(x)


def run_guarded(x: dict, o: Options) -> tuple[torch.Tensor, list[str]]:
    """The sums of the kernels on guarded tensors, and every access outside of a tensor."""
    x = {name: guarded(value) for name, value in x.items()}
    rows, splits = x["student_TD"].shape[0], -(-x["head_VD"].shape[0] // tile.SPLIT_COLUMNS)
    partial = torch.full((splits * 9 * rows + 128,), torch.nan)
    inner = partial[64:-64].view(splits, 9, rows)
    sums = torch.full((rows * 9 + 128,), torch.nan)
    tracer = MemoryTracer()
    tracer.allow(*x.values(), partial[64:-64], sums[64:-64])
    matrices = [x.get(name) for name in tile._MATRICES]
    with tracer.recording():
        tile._launch_row_sums(matrices, x.get("bias_V"), x["target_T"], x.get("shift_T"), inner, o)
        tile._launch_merge(inner, sums[64:-64].view(rows, 9), "teacher_TD" in x)
    for buffer in (partial, sums):
        if not buffer[:64].isnan().all() or not buffer[-64:].isnan().all():
            tracer.outside.append("store over a guard")
    return sums[64:-64].view(rows, 9), tracer.outside


def random_case(seed: int) -> tuple[dict, Options]:
    g = random.Random(seed)
    rows, width, vocabulary = g.randint(1, 40), g.randint(1, 40), g.randint(1, 200)
    dtype = g.choice([torch.float32, torch.bfloat16])
    own_width = g.choice([None, None, g.randint(1, 40)])
    x = tensors(rows, width, vocabulary, dtype, seed, own_width)
    x["shift_T"] = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    if g.random() < 0.3:
        del x["bias_V"]
    if g.random() < 0.2 and own_width is None:
        del x["teacher_TD"]
    return x, Options(softcap=g.choice([None, 3.0]), temperature=0.8)


def check_guarded(seed: int) -> None:
    x, o = random_case(seed)
    sums, outside = run_guarded(x, o)
    assert not outside, outside[:3]
    assert torch.equal(sums, tile.row_sums(**x, options=o))


@pytest.mark.parametrize("seed", range(8))
def test_touches_nothing_outside_its_tensors(seed):
    check_guarded(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 508))
def test_touches_nothing_outside_its_tensors_over_500_cases(seed):
    check_guarded(seed)


MASKS = [
    "(row < rows)", "(column < columns)", "inside = column < V", "row_exists = row < T",
]  # fmt: skip


@pytest.mark.parametrize("where", range(len(MASKS) + 1))
def test_a_mask_off_by_one_is_caught(where, monkeypatch, tmp_path):
    """Each mask of the kernels, widened by one: `row_exists` stands in both kernels."""
    source = Path(tile_kernels.__file__).read_text()
    mask = MASKS[min(where, len(MASKS) - 1)]
    pieces = source.split(mask)
    assert len(pieces) == (3 if mask.startswith("row_exists") else 2)
    at = 2 if where == len(MASKS) else 1
    mutant = mask.join(pieces[:at]) + mask.replace("<", "<=") + mask.join(pieces[at:])
    file = tmp_path / "mutant.py"
    file.write_text(mutant.replace("from .", "from fastsd_kernels.loss_head.triton."))
    spec = importlib.util.spec_from_file_location("mutant", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = tensors(21, 24, 73)
    expected = tile.row_sums(**x, options=Options())
    monkeypatch.setattr(tile, "row_sums_kernel", module.row_sums_kernel)
    monkeypatch.setattr(tile, "merge_kernel", module.merge_kernel)
    sums, outside = run_guarded(x, Options())
    assert outside or not torch.equal(sums, expected)


def test_offsets_beyond_32_bits(either):
    """A head whose rows lie 4 GiB apart, in address space that is reserved and never filled."""
    x = tensors(5, 16, 4)
    stride = 1 << 30
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    whole = torch.frombuffer(mmap.mmap(-1, 4 * (3 * stride + 64), flags), dtype=torch.float32)
    head = whole.as_strided((4, 16), (stride, 1)).copy_(x["head_VD"])
    found = tile.row_sums(**(x | {"head_VD": head}), options=Options())
    assert torch.equal(found, tile.row_sums(**x, options=Options()))


@pytest.mark.slow
def test_more_rows_than_a_second_grid_axis_holds(monkeypatch):
    """70,000 rows; the last one as if it were alone."""
    wide = TileConfig(1024, 32, 16, 1, 4, 2)
    monkeypatch.setattr(tile, "tile_config", lambda *_: wide)
    monkeypatch.setattr(tile, "_MERGE_ROWS", 1024)
    x = exact_products(tensors(70_000, 4, 70))
    last = {k: v[-1:] if k.endswith(("_TD", "_T")) else v for k, v in x.items()}
    sums = tile.row_sums(**x, options=Options())
    assert torch.equal(sums[-1:], tile.row_sums(**last, options=Options()))
    exact = exact_values(x, Options())["LSE_s"]
    assert (sums[:, 0] + sums[:, 1].log()).sub(exact).norm() / exact.norm() <= FP32_ERROR
