"""Every Triton kernel in every configuration of the table, compiled for GPUs that are not here.

What it shows: nothing spills, shared memory suffices, tensor-core and TMA instructions are there.
It shows no speed. `pytest -s` prints the table of resources. The fast tests compile representative
cases, the slow ones all of them.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

import aot

from fastsd_kernels.loss_head.triton import tile
from fastsd_kernels.loss_head.triton.configs import tile_config

TARGETS = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def is_tile(case) -> bool:
    return case.name.startswith("tile ")


def check(found: list[aot.Resources]) -> None:
    print("\n" + "\n".join(str(x) for x in found))
    assert found
    for x in found:
        assert x.spills == 0, f"spills, so it may not be in the table: {x}"
        assert x.shared_bytes <= aot.SHARED_LIMIT[x.architecture], f"shared memory: {x}"
        if is_tile(x.case):
            check_tile_instructions(x)


def check_tile_instructions(x: aot.Resources) -> None:
    count, exact = x.instructions, " fp32 " in x.case.name
    if x.case.constexprs["TMA"]:
        assert count["tma"] > 0, str(x)
    if exact:
        assert count["wgmma"] == count["mma.sync"] == count["tcgen05"] == 0, f"not IEEE fp32: {x}"
    elif "scalar" in x.case.name:
        assert count["mma.sync"] or count["wgmma"] or count["tcgen05"], str(x)
    else:
        assert count[{"sm_90": "wgmma", "sm_100": "tcgen05"}.get(x.architecture, "mma.sync")], x
        assert count["tma"] or count["cp.async"], str(x)


def test_every_kernel_has_a_case():
    for target in TARGETS:
        assert {case.kernel.__name__ for case in aot.cases(target)} == aot.kernels()


def test_row_kernels_on_aligned_rows_do_not_spill():
    check_rows("sm_90", lambda case: not is_tile(case) and case.name.endswith("V%16=0"))


@pytest.mark.slow
@pytest.mark.parametrize("target", [*TARGETS, "sm_89", "sm_120", "gfx942"])
def test_no_row_kernel_spills(target):
    check_rows(target, lambda case: not is_tile(case))


def check_rows(target: str, wanted) -> None:
    found = aot.compile_all(target, wanted)
    check(found)
    if target != "gfx942":
        aligned = [x for x in found if x.case.name.endswith("V%16=0") and reads_logits(x)]
        assert aligned and all(x.instructions["ld.v4"] for x in aligned)


def reads_logits(x: aot.Resources) -> bool:
    """All but gradients of no divergence: they may write zeros without a look."""
    return "target_logits" not in x.case.name and "DIVERGENCE=none" not in x.case.name


@pytest.mark.parametrize("target", TARGETS)
def test_the_usual_tile_does_not_spill(target):
    found = aot.compile_all(target, lambda case: is_tile(case) and case.representative)
    check(found)
    assert any(x.case.constexprs["TMA"] for x in found) == (target != "sm_80")


@pytest.mark.slow
@pytest.mark.parametrize("target", [*TARGETS, "sm_89", "sm_120"])
def test_every_tile_does_not_spill(target):
    check(aot.compile_all(target, is_tile))


def test_a_spilling_configuration_is_rejected():
    """The tile of the table folded in one piece: what PIECES is for."""
    config = replace(tile_config((9, 0), torch.bfloat16, ("pointers",), 2), PIECES=1)
    options = ("bias", "softcap", "shift")
    case = tile._aot_case("bf16", "pointers", config, "shared head", options, False)
    found = aot.compile_case(case, "sm_90")
    assert found.spills > 0 and found.stack_bytes > 0
    with pytest.raises(AssertionError, match="spills, so it may not be in the table"):
        check([found])
    with pytest.raises(AssertionError, match="shared memory"):
        check([replace(found, spills=0, shared_bytes=aot.SHARED_LIMIT["sm_90"] + 1)])
