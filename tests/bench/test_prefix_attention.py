"""The attention bench runs, counts what it says, and its contestants compute the same."""

import json

import torch

from bench.bench_prefix_attention import CELLS, main, paths, questions, unshared
from fastsd_kernels import PrefixTree, shared_prefix_attention


def test_unshared_rows_are_the_trees():
    tree = PrefixTree(*questions(2, 3, 2, 2))
    assert tree.lengths == (3, 2, 2, 3, 2, 2) and tree.parents == (None, 0, 0, None, 3, 3)
    rows = torch.stack(paths(tree))
    assert rows.tolist() == [
        [0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [7, 8, 9, 10, 11], [7, 8, 9, 12, 13]
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(14, n, 8, generator=generator) for n in (4, 2, 2))
    packed = shared_prefix_attention(query, key, value, tree)
    full = unshared(query, key, value, rows).transpose(1, 2)
    torch.testing.assert_close(full, packed[rows])


def test_runs(capsys, tmp_path):
    cell = list(CELLS)[-1]
    main(["--rounds", "1", "--cells", cell, "--json", str(tmp_path / "x.json")])
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert [(row["dtype"], row["contestant"]) for row in found["rows"]] == [
        (dtype, name)
        for dtype in ("float32", "bfloat16")
        for name in ("native", "torch", "unshared")
    ]
    for row in found["rows"]:
        assert 0 < row["forward_s"] < row["both_s"]
        assert row.get("gradient_error", 0) < (1e-5 if row["dtype"] == "float32" else 2e-2)
