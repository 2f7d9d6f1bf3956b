"""No row kernel touches memory outside its arguments: canaries, traced accesses, and mutants.

Every pointer argument lies between NaN canaries, rows of matrices too. A store outside changes a
canary, a load outside that counts makes a result NaN, and any other load outside is seen by the
tracer. That all of this would notice is shown with kernels whose masks are off by one or missing.
"""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import (
    MemoryTracer,
    patched_once,
    require_interpreter,
    rounded_bf16,
)

require_interpreter()

from fastsd_kernels.loss_head.contract import Inputs, Options  # noqa: E402
from fastsd_kernels.loss_head.triton import finish, row_kernels  # noqa: E402
from fastsd_kernels.loss_head.triton import scratch as scratch_kernels  # noqa: E402
from fastsd_kernels.loss_head.triton.finish import RESULTS, finish_rows  # noqa: E402
from fastsd_kernels.loss_head.triton.scratch import (  # noqa: E402
    Scratch,
    entry_sums,
    row_gradients,
    row_sums,
    target_logits,
)
from fastsd_kernels.loss_head.triton.top_k import top_k, write_gradient  # noqa: E402

# At least what a whole block of any kernel could reach beyond the end: 128 rows of 13 columns.
GUARD = 2048
KERNELS = {
    row_kernels: (
        "row_sums_kernel", "entry_sums_kernel", "gradient_kernel", "target_logits_kernel",
    ),
    finish: ("finish_kernel",),
}  # fmt: skip
OFF_BY_ONE = {
    r"column < vocabulary": "column <= vocabulary",
    r"column < width": "column <= width",
    r"y < vocabulary": "y <= vocabulary",
    r"y >= 0": "y >= -1",
    r"row < rows": "row <= rows",
}
UNMASKED = {
    r"tl\.load\(([^()]+), (?:inside|exists), [^()]+\)": r"tl.load(\1)",
    r"tl\.store\((.+), inside\)": r"tl.store(\1)",
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(
        scratch_kernels, "row_config", lambda capability, kernel: {"BLOCK": 64, "num_warps": 4}
    )
    with rounded_bf16(), patched_once():
        yield


class Guarded:
    """Tensors between canaries."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.tracer = MemoryTracer()
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def new(self, rows: int, columns: int, dtype=torch.float32, gap: int = 0) -> torch.Tensor:
        """[rows, columns] of canaries itself, `gap` more of them between rows."""
        stride = columns + gap
        size = 2 * GUARD + rows * stride
        canary = -1 if dtype == torch.int64 else torch.nan
        buffer = torch.full((size,), canary, dtype=dtype)
        view = buffer[GUARD : size - GUARD].view(rows, stride)[:, :columns]
        self._buffers.append((buffer, view))
        self.tracer.allow(view)
        return view

    def random(self, rows: int, columns: int, gap: int = 0) -> torch.Tensor:
        view = self.new(rows, columns, gap=gap)
        return view.copy_(torch.randn(rows, columns, generator=self.generator))

    def intact(self) -> bool:
        """Whether every canary is there. Empties the tensors."""
        for buffer, view in self._buffers:
            canary = -1 if buffer.dtype == torch.int64 else torch.nan
            view.fill_(canary)
            same = buffer == -1 if buffer.dtype == torch.int64 else buffer.isnan()
            if not same.all():
                return False
        return True


def draw(seed: int) -> tuple[int, int, dict, set[str]]:
    """Rows, vocabulary, options and the terms of the loss."""
    pick = random.Random(seed)
    vocabulary = pick.choice([1, 2, 63, 64, 65, 128, pick.randint(3, 200)])
    options: dict = {"divergence": pick.choice(["forward_kl", "reverse_kl", "jsd"]), "beta": 0.3}
    if pick.random() < 0.2:
        options["divergence"] = "sampled_token"
    else:
        options["entry_clip"] = pick.choice([None, 0.05])
        if vocabulary > 2 and pick.random() < 0.3:
            options |= {"top_k": pick.randint(1, vocabulary - 1), "tail": pick.random() < 0.5}
    every = "teacher bias divergence shift policy old entropy gradient bf16".split()
    terms = {term for term in every if pick.random() < 0.75}
    options |= {"softcap": pick.choice([None, 3.0])}
    options |= {"clip": 0.2 if {"policy", "old"} <= terms and pick.random() < 0.5 else None}
    if "teacher" not in terms:
        options |= {"top_k": None, "entry_clip": None}
    return pick.randint(1, 4), vocabulary, options, terms


def fault(seed: int) -> str | None:
    """Runs the kernels on one random case; what they did that they must not, if anything."""
    rows, vocabulary, settings, terms = draw(seed)
    options, memory = Options(**settings), Guarded(seed)
    student = memory.random(rows, vocabulary, gap=3)
    teacher = memory.random(rows, vocabulary, gap=3) if "teacher" in terms else None
    selects = teacher is not None and options.top_k is not None
    biased = "bias" in terms and not selects
    scratch = Scratch(student, teacher, memory.random(1, vocabulary)[0] if biased else None)
    target = memory.new(1, rows, torch.int64)[0]
    target.copy_(torch.randint(0, vocabulary, (rows,), generator=memory.generator))
    target[0] = (-1, vocabulary, int(target[0]))[seed % 3]  # outside: nothing may be read

    def weight(name: str, *needed: str) -> torch.Tensor | None:
        return memory.random(1, rows)[0] if {name, *needed} <= terms else None

    inputs = Inputs(
        student, student, target, scratch.bias_V, teacher, None, weight("divergence", "teacher"),
        weight("policy"), weight("old", "policy"), weight("entropy"),
    )  # fmt: skip
    shift = weight("shift", "teacher")
    outputs = [sums := memory.new(rows, 9), results := memory.new(len(RESULTS), rows, gap=5)]
    entries, coefficients, found = None, None, None
    train = "gradient" in terms
    width = 1 + seed % 100
    hidden, head = memory.random(rows, width, gap=3), memory.random(vocabulary, width, gap=3)
    outputs.append(picked := memory.new(1, rows))
    with memory.tracer.recording():
        target_logits(hidden, head, scratch.bias_V, target, options, picked[0])
        row_sums(scratch, target, options, sums)
    if selects:
        found = top_k(scratch, target, options, sums, train)
        entries = memory.new(rows, 5).copy_(found.entries_TE)
    elif teacher is not None and (options.divergence == "jsd" or options.entry_clip):
        outputs.append(entries := memory.new(rows, 5))
        with memory.tracer.recording():
            entry_sums(scratch, options, sums, entries)
    if train:
        coefficients = memory.new(rows, row_kernels.COEFFICIENTS.value)
        narrow = memory.new(rows, vocabulary, torch.bfloat16, gap=3)
        outputs.append(gradient := narrow if "bf16" in terms else student)
    with memory.tracer.recording():
        finish_rows(
            sums, inputs, options, results, shift_T=shift,
            entries_TE=entries, coefficients_TC=coefficients,
        )  # fmt: skip
        if coefficients is not None:
            row_gradients(scratch, inputs, options, coefficients, gradient)
    if found is not None and coefficients is not None:
        write_gradient(found, inputs, options, coefficients, gradient)
    if memory.tracer.outside:
        return memory.tracer.outside[0]
    if not all(x.isfinite().all() for x in outputs):
        return "a result is not finite"
    return None if memory.intact() else "a canary changed"


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_canaries(first):
    for seed in range(first, first + 15):
        assert fault(seed) is None, draw(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(60, 560, 50))
def test_canaries_of_500_shapes(first):
    for seed in range(first, first + 50):
        assert fault(seed) is None, draw(seed)


def mutants(changes: dict[str, str]):
    """(module, changed source, what changed) for each place where a pattern matches."""
    for module in KERNELS:
        source = Path(module.__file__).read_text()
        for pattern, replacement in changes.items():
            for match in re.finditer(pattern, source):
                changed = match.expand(replacement)
                text = source[: match.start()] + changed + source[match.end() :]
                yield module, text, f"{match.group()} -> {changed}"


def install(module, source: str, folder: Path, monkeypatch) -> None:
    """The changed module's kernels in place of the real ones."""
    path = folder / f"mutant_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    name = f"{module.__package__}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, mutant)
    spec.loader.exec_module(mutant)
    user = scratch_kernels if module is row_kernels else finish
    for kernel in KERNELS[module]:
        monkeypatch.setattr(user, kernel, getattr(mutant, kernel))


def survivors(changes: dict[str, str], tmp_path: Path, seeds: int) -> tuple[int, list[str]]:
    """How many mutants there are, and those that no case betrayed."""
    total, alive = 0, []
    for module, source, change in mutants(changes):
        total += 1
        with pytest.MonkeyPatch.context() as monkeypatch:
            install(module, source, tmp_path, monkeypatch)
            if not any(fault(seed) for seed in range(seeds)):
                alive.append(change)
    return total, alive


def test_every_mask_off_by_one_is_caught(tmp_path):
    total, alive = survivors(OFF_BY_ONE, tmp_path, 60)
    assert total >= 6 and not alive, alive


@pytest.mark.slow
def test_every_missing_mask_is_caught(tmp_path):
    total, alive = survivors(UNMASKED, tmp_path, 60)
    assert total >= 40 and not alive, alive
