"""The tile kernel: its interpreted tests in a process of their own, its table, and on a GPU.

The tests marked gpu have not run on a GPU yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

pytest.importorskip("triton")

from fastsd_kernels.loss_head.contract import Options
from fastsd_kernels.loss_head.triton import tile
from fastsd_kernels.loss_head.triton.configs import (
    SPLIT_COLUMNS,
    architecture,
    row_config,
    tile_config,
)
from fastsd_kernels.testing import loss_head_inputs


def run_interpreted(marker: str, cache: Path) -> None:
    file = Path(__file__).parent / "interpreted" / "test_tile.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", str(file)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache)},
    )  # fmt: skip
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0 and "skipped" not in done.stdout.splitlines()[-1]


def test_under_the_interpreter(tmp_path):
    run_interpreted("not slow and not gpu", tmp_path)


@pytest.mark.slow
def test_under_the_interpreter_at_length(tmp_path):
    run_interpreted("slow", tmp_path)


def test_architectures_that_are_not_in_the_table_take_the_default():
    assert architecture((9, 0)) == "sm_90" and architecture((10, 3)) == "sm_100"
    assert architecture((9, 4)) == "gfx942"
    assert architecture((8, 9)) == architecture((12, 0)) == architecture(None) == "default"
    for capability in ((8, 0), (8, 9), (12, 0), (9, 4), None):
        assert not tile_config(capability, torch.bfloat16, ("tma", "pointers"), 2).TMA
    assert tile_config((9, 0), torch.bfloat16, ("tma", "scalar"), 2).TMA
    assert not tile_config((9, 0), torch.float32, ("tma", "scalar"), 2).TMA


def test_splits_hold_whole_tiles_and_row_blocks_are_powers_of_two():
    for capability in ((8, 0), (9, 0), (10, 0), None):
        for dtype in (torch.bfloat16, torch.float32):
            for access in (("tma", "pointers"), ("pointers",), ("scalar",)):
                for streams in (1, 2):
                    config = tile_config(capability, dtype, access, streams)
                    assert SPLIT_COLUMNS % config.BLOCK_V == 0
                    assert config.BLOCK_V % config.PIECES == 0
        block = row_config(capability, "gradient")["BLOCK"]
        assert block & (block - 1) == 0


@pytest.mark.parametrize(
    ("dtype", "width", "stride", "expected"),
    [
        (torch.bfloat16, 64, 64, ("tma", "pointers")),
        (torch.bfloat16, 24, 24, ("tma", "scalar")),
        (torch.bfloat16, 60, 60, ("scalar",)),
        (torch.float32, 60, 60, ("tma", "scalar")),
        (torch.float32, 48, 64, ("tma", "pointers")),
        (torch.bfloat16, 64, 0, ("pointers",)),
    ],
)
def test_access_follows_widths_and_strides(dtype, width, stride, expected):
    x = torch.zeros(4096, dtype=dtype).as_strided((5, width), (stride, 1))
    assert tile.accesses([x, None]) == expected


def test_an_unaligned_base_rules_out_descriptors_and_vectors():
    x = torch.zeros(4096, dtype=torch.bfloat16)[1:].as_strided((5, 64), (64, 1))
    assert tile.accesses([x]) == ("scalar",)


gpu = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_gpu(rows, width, vocabulary, dtype, device="cuda") -> dict:
    x = loss_head_inputs(rows, width, vocabulary, dtype)
    names = ("student_TD", "head_VD", "target_T", "teacher_TD", "bias_V")
    return {name: x[name].detach().to(device) for name in names}


def exact(x: dict, side: str, o: Options) -> torch.Tensor:
    z = x[f"{side}_TD"].double().cpu() @ x["head_VD"].double().cpu().T + x["bias_V"].double().cpu()
    z = z * o.logit_scale
    z = z if o.softcap is None else o.softcap * torch.tanh(z / o.softcap)
    return z / o.temperature


@gpu
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 1.3}], ids=str)
@pytest.mark.parametrize("width", [64, 72, 75, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_sums_match_fp64(dtype, width, options):
    o, x = Options(**options), on_gpu(333, width, 10_007, dtype)
    sums = tile.row_sums(**x, options=o).double().cpu()
    z_s, z_t = exact(x, "student", o), exact(x, "teacher", o)
    gap = z_s - z_t
    lse_s, lse_t = sums[:, 0] + sums[:, 1].log(), sums[:, 4] + sums[:, 5].log()
    torch.testing.assert_close(lse_s, z_s.logsumexp(-1), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse_t, z_t.logsumexp(-1), rtol=2e-6, atol=2e-6)
    expected = (z_s.softmax(-1) * gap).sum(-1), (z_t.softmax(-1) * gap).sum(-1)
    torch.testing.assert_close(sums[:, 2] / sums[:, 1], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[:, 6] / sums[:, 5], expected[1], rtol=1e-5, atol=1e-5)
    y = x["target_T"].cpu()[:, None]
    torch.testing.assert_close(sums[:, 7], z_s.gather(1, y)[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[:, 8], z_t.gather(1, y)[:, 0], rtol=1e-5, atol=1e-5)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_rows_do_not_depend_on_their_batch(dtype):
    x = on_gpu(1000, 128, 9000, dtype)
    whole = tile.row_sums(**x, options=Options())
    assert torch.equal(whole, tile.row_sums(**x, options=Options()))
    for start, stop in ((0, 1), (1, 130), (130, 131), (131, 1000)):
        part = {k: v[start:stop] if k.endswith(("_TD", "_T")) else v for k, v in x.items()}
        assert torch.equal(whole[start:stop], tile.row_sums(**part, options=Options()))


@gpu
def test_gpu_equal_streams_give_equal_columns_and_many_rows_work():
    x = on_gpu(66_000, 64, 500, torch.bfloat16)
    x["teacher_TD"] = x["student_TD"]
    sums = tile.row_sums(**x, options=Options(softcap=5.0))
    assert torch.equal(sums[:, :2], sums[:, 4:6]) and torch.equal(sums[:, 7], sums[:, 8])
    assert not sums[:, 2].any() and not sums[:, 6].any()
