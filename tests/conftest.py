"""Settings every test runs under: one thread (the machine is small and results must not depend on
it), no network, and tests marked gpu skipped where there is no CUDA device."""

from __future__ import annotations

import os

# Before torch is imported anywhere, and inherited by subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# The files that take longest, longest first: begun first, so that none is left over at the end of
# a run that hands whole files to two workers (`make test`).
LONGEST = (
    "project/test_packaging.py",
    "training/test_resume.py",
    "parallel/test_runs.py",
    "parallel/test_ranks.py",
    "kernels/loss_head/test_triton.py",
    "kernels/loss_head/test_triton_tile.py",
    "kernels/loss_head/test_triton_aot.py",
    "project/test_examples_launch.py",
    "rollout/test_sampler.py",
    "runtime/test_exits.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((n for n, end in enumerate(LONGEST) if path.endswith(end)), len(LONGEST))

    items.sort(key=place)  # stable: the others stay in their order
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
