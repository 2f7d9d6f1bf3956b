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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
