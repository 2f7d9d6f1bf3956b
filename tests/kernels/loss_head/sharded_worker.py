"""One rank of test_sharded.py.

FOLDER/cases.pt has a list of cases for groups of the first 2, 3, .. ranks; what this rank found
goes to FOLDER/RANK.pt. A case is a dict: inputs (tensors of the whole vocabulary), options, sizes
(of the shards, in the order of the vocabulary), order (the shard of each rank), upstream, call,
tiny (a few rows per chunk and tile), metered, and by_rank (what one rank passes instead). A refused
call is saved as its error and the next case follows, which would hang with ranks out of step.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from fastsd_kernels.loss_head import sharded
from fastsd_kernels.loss_head.sharded import evaluation
from fastsd_kernels.testing import WorkMeter

LEAVES = ("student_TD", "head_VD", "bias_V")
BY_ENTRY = ("head_VD", "bias_V", "teacher_head_VD")
CHUNK_ROWS, TILE_ROWS = 10, 3
SENT = {"all_gather": 0, "all_reduce": 0}


def count(name: str) -> None:
    send = getattr(dist, name)

    def counted(*args, **kwargs):
        SENT[name] += 1
        return send(*args, **kwargs)

    setattr(dist, name, counted)


def run(case: dict, rank: int, group: dist.ProcessGroup) -> dict:
    """Loss, statistics and gradients of this rank's call, or its error."""
    own = case.get("by_rank", {}).get(rank, {})
    shard = case.get("order", range(len(case["sizes"])))[rank]
    start, size = sum(case["sizes"][:shard]), case["sizes"][shard]
    x = {k: v for k, v in (case["inputs"] | own.get("inputs", {})).items() if v is not None}
    x = {k: v[start : start + size] if k in BY_ENTRY else v for k, v in x.items()}
    leaves = {k: x[k].detach().clone().requires_grad_() for k in LEAVES if k in x}
    for name in own.get("frozen", ()):
        leaves[name].requires_grad_(False)
    name = own.get("call", case.get("call", "loss"))
    function = getattr(sharded, f"vocabulary_sharded_linear_{name}")
    options = {"vocabulary_start": start} | case["options"] | own.get("options", {})
    tiny = case.get("tiny")
    evaluation.SCRATCH_BYTES["cpu"] = CHUNK_ROWS * 2 * max(case["sizes"]) * 8 if tiny else 1 << 20
    evaluation.TILE_LOGITS["cpu"] = TILE_ROWS * size if tiny else 1 << 20
    SENT.update(dict.fromkeys(SENT, 0))
    x |= leaves
    matrices = x.pop("student_TD"), x.pop("head_VD"), x.pop("target_T")
    try:
        with WorkMeter() if case.get("metered") else nullcontext() as meter:
            out = function(*matrices, **x, **options, group=group)
            if name == "loss":
                (out.loss * case["upstream"]).backward()
    except (TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found = {k: v.detach() for k, v in vars(out).items() if isinstance(v, torch.Tensor)}
    found |= {f"d {k}": v.grad for k, v in leaves.items() if v.grad is not None}
    if meter is None:
        return {"found": found}
    return {"found": found, "work": {"flop": meter.product_flop, **SENT}}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in SENT:
        count(name)
    found = {}
    for members, cases in torch.load(folder / "cases.pt").items():
        group = dist.new_group(range(members))
        if rank < members:
            found[members] = [run(case, rank, group) for case in cases]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
