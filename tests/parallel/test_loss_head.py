"""How the loss head of many ranks is laid out, and what refuses it; the numbers are in
test_sharded_run.py."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sharded_run_worker import run_cases
from sharded_settings import newest, settings
from small_runs import losses, small_config

from fastsd.errors import FastsdError
from fastsd.parallel.loss_head import LONGEST_ROWS, Head, head_layout

HEAD = Head(
    vocabulary=50_000, compute_bytes=2, tied=False, trains=True, streams=2, heads=1, device="cuda"
)


def config(prompts=4, samples=4, tokens=100, budget=10**6, impl="auto", **parallel):
    return small_config(
        "critique",
        rollout={
            "prompts_per_step": prompts, "samples_per_prompt": samples, "max_new_tokens": tokens
        },
        optim={"micro_batch_tokens": budget},
        loss={"impl": impl},
        parallel=parallel,
    )  # fmt: skip


def test_auto_takes_what_moves_fewer_bytes():
    # Gathered: V (2 + 4) bytes for each hidden unit; sharded: R (2 * 2 + 8).
    most, small = 10_000 * 6 // 12, HEAD._replace(vocabulary=10_000)
    for rows, layout in ((most - 100, "sharded"), (most + 100, "gathered")):
        assert head_layout(config(1, 2, rows // 2), small, 2)[0] == layout
    assert "x the bytes" in head_layout(config(), HEAD, 2)[1]


def test_auto_gathers_where_a_rank_has_many_rows():
    # The sharded head's arithmetic is slower, and grows with them.
    for device, rows in LONGEST_ROWS.items():
        head = HEAD._replace(device=device, vocabulary=10**6)
        assert head_layout(config(1, 2, rows), head, 2)[0] == "sharded"
        layout, why = head_layout(config(1, 2, rows + 1), head, 2)
        assert layout == "gathered" and f"{rows + 1} response tokens for each rank" in why


@pytest.mark.parametrize(
    ("change", "settings", "moves"),
    [
        ({"trains": False}, {}, 2 / 12),  # nothing is reduced
        ({"streams": 1}, {}, 6 / 10),  # no teacher
        ({"heads": 2}, {}, 8 / 12),
        ({"compute_bytes": 4}, {}, 8 / 16),
        ({}, {"reduce_dtype": "model"}, 4 / 12),
        ({}, {"budget": 200}, (2 + 4 * 5) / 12),  # 2,000 rows: five micro-batches on each of two
    ],
)
def test_what_each_layout_moves(change, settings, moves):
    rows = 2000
    _, why = head_layout(config(2, 10, 100, **settings), HEAD._replace(**change), 2)
    assert float(why.split()[2]) == pytest.approx(moves * 50_000 / rows, rel=0.06)


def test_a_tied_head_a_given_implementation_and_a_tiny_vocabulary_are_gathered():
    assert head_layout(config(), HEAD, 2)[0] == "sharded"
    assert head_layout(config(), HEAD._replace(tied=True), 2)[0] == "gathered"
    assert head_layout(config(impl="native"), HEAD, 2)[0] == "gathered"
    # 2 tokens on each of 50 ranks leave none for the others.
    assert head_layout(config(), HEAD._replace(vocabulary=99), 64)[0] == "gathered"
    assert head_layout(config(1, 2, 2), HEAD._replace(vocabulary=128), 64)[0] == "sharded"


def test_the_setting_decides():
    assert head_layout(config(head="gathered"), HEAD, 2) == ("gathered", "parallel.head")
    tied = HEAD._replace(tied=True)
    assert head_layout(config(head="sharded"), tied, 2) == ("sharded", "parallel.head")


def test_a_sharded_head_has_no_other_implementation():
    with pytest.raises(FastsdError, match=r'parallel.head = "sharded" with loss.impl = "native"'):
        head_layout(config(impl="native", head="sharded"), HEAD, 2)
    with pytest.raises(FastsdError, match="64 ranks with 2 of 99 tokens each: some have none"):
        head_layout(config(head="sharded"), HEAD._replace(vocabulary=99), 64)


def test_gradients_are_reduced_in_the_type_that_is_asked_for(tmp_path):
    steps, lr = 3, 1e-3
    trees = {
        name: settings(
            "reference",
            model={"dtype": "bfloat16"},
            optim={"steps": steps, "lr": lr, "warmup_steps": 0, "weight_decay": 0.0},
            parallel={"reduce_dtype": name},
        )
        for name in ("float32", "model")
    }
    run_cases(tmp_path, 2, trees)
    wide, narrow = (tmp_path / f"{name}-2" for name in trees)
    assert losses(wide)[0] == losses(narrow)[0]
    ours, theirs = (load_file(newest(run) / "model.safetensors") for run in (wide, narrow))
    gaps = [(ours[name].float() - theirs[name].float()).abs().max() for name in ours]
    assert any(gap > 0 for gap in gaps)
    # AdamW moves no weight by more than about lr in each update; bf16 rounds what is saved.
    largest = max(float(x.abs().max()) for x in ours.values())
    assert max(gaps) <= 2 * steps * lr + largest * torch.finfo(torch.bfloat16).eps
    header = json.loads((wide / "run.json").read_text())["implementations"]
    assert header["dtype"] == "bfloat16"
