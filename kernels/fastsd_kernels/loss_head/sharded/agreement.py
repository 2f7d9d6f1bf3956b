"""Before a sharded call begins: every rank checks its arguments, then all compare them.

One message of fixed size carries what must be equal on all ranks (shapes, dtypes, options, terms,
checksums of the row vectors on the rows that count) and each rank's own part of the vocabulary.
What can be checked alone is checked before it and reported with it; what needs the size of the
whole vocabulary is checked after it, on arguments that are then known to be equal, so it fails on
every rank or on none. Shape suffixes: T rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..compaction import Rows, keep_rows
from ..contract import Inputs, Options
from ..validation import check_inputs, check_options, check_rows, check_terms, check_weights
from .ranks import Ranks
from .rows import Shard


class Call(NamedTuple):
    """What all ranks agreed on.

    rows: those that count. largest: V of the largest shard, from which every rank derives the same
    chunks.
    """

    rows: Rows
    options: Options
    ranks: Ranks
    shard: Shard
    largest: int


def agree_on_loss(
    inputs: Inputs,
    options: Options,
    start: int,
    group: dist.ProcessGroup | None,
    wanted: tuple[bool, ...],
    reduce_hidden_gradient: bool,
) -> Call:
    """Raises on every rank or on none."""
    names = ("student_TD", "head_shard_VD", "bias_V")
    same = {f"gradient of {name}": want for name, want in zip(names, wanted, strict=True)}
    same["reduce_hidden_gradient"] = reduce_hidden_gradient
    call = _agree("loss", inputs, None, options, start, group, same)
    check_terms(inputs, call.options)
    check_weights(inputs)
    return call


def agree_on_statistics(
    inputs: Inputs,
    mask_T: Tensor | None,
    options: Options,
    start: int,
    group: dist.ProcessGroup | None,
) -> Call:
    """Raises on every rank or on none."""
    return _agree("statistics", inputs, mask_T, options, start, group, {})


def _agree(
    function: str,
    inputs: Inputs,
    mask_T: Tensor | None,
    options: Options,
    start: int,
    group: dist.ProcessGroup | None,
    same: dict[str, Any],
) -> Call:
    ranks = Ranks(group)
    rows = error = None
    own = {}
    try:
        if isinstance(start, bool) or not isinstance(start, int):
            raise TypeError(f"vocabulary_start: expected an int, got {type(start).__name__}")
        check_inputs(inputs, mask_T)
        counts_T = _counts(inputs) if mask_T is None else mask_T != 0
        rows = keep_rows(_constants(inputs), counts_T, drop=True)
        same = (
            {"function": function}
            | _shapes(rows.inputs)
            | vars(options)
            | same
            | _row_vectors(rows.inputs)
        )
        own = {"start": start, "size": inputs.head_VD.shape[0]}
    except (TypeError, ValueError) as refused:
        # "head_VD" alone, not as a part of "teacher_head_VD".
        error = type(refused)(re.sub(r"\bhead_VD\b", "head_shard_VD", str(refused)))
    everyone = ranks.agree(same, own, error, _device(inputs))
    assert rows is not None
    sizes = _tiling(everyone)
    # A view with as many rows as the whole head, for checks that look at its shape.
    whole_VD = inputs.head_VD[:1].expand(sum(sizes), -1)
    checked = check_options(whole_VD, options)
    check_rows(replace(rows.inputs, head_VD=whole_VD), rows.index_T)
    shard = Shard(ranks.rank, start, inputs.head_VD.shape[0])
    return Call(rows, checked, ranks, shard, max(sizes))


def _device(inputs: Inputs) -> torch.device:
    found = (x.device for x in vars(inputs).values() if isinstance(x, Tensor))
    return next(found, torch.device("cpu"))


def _tiling(shards: list[dict]) -> list[int]:
    """The shards' sizes, if each begins where another one ends."""
    expected = 0
    for shard in sorted(shards, key=lambda shard: shard["start"]):
        if shard["start"] != expected:
            spans = (f"[{s['start']}, {s['start'] + s['size']})" for s in shards)
            found = ", ".join(f"{span} on rank {rank}" for rank, span in enumerate(spans))
            raise ValueError(
                f"vocabulary_start: expected shards that tile the vocabulary from 0 on, got {found}"
            )
        expected += shard["size"]
    return [shard["size"] for shard in shards]


def _shapes(kept: Inputs) -> dict[str, Any]:
    """What must be equal on all ranks of the matrices and the bias."""
    rows, width = kept.student_TD.shape
    bias, head, teacher = kept.bias_V, kept.teacher_head_VD, kept.teacher_TD
    return {
        "student_TD": f"{rows} rows that count, D = {width}",
        "dtype": f"{kept.student_TD.dtype} on {kept.student_TD.device.type}",
        "teacher_TD": teacher is not None,
        "teacher_head_VD": None if head is None else f"D' = {head.shape[1]}",
        "bias_V": None if bias is None else bias.dtype,
    }


def _row_vectors(kept: Inputs) -> dict[str, Any]:
    """Checksums of the row vectors' bits; None for those that are not there."""
    vectors = {name: x for name, x in vars(kept).items() if name.endswith("_T")}
    given = {name: _checksum(x) for name, x in vectors.items() if x is not None}
    sums = torch.stack(list(given.values())).tolist()
    found = {name: f"checksum {n:x}" for name, n in zip(given, sums, strict=True)}
    return dict.fromkeys(vectors) | found


def _checksum(x_T: Tensor) -> Tensor:
    bits_T = x_T.view({4: torch.int32, 8: torch.int64}[x_T.element_size()]).to(torch.int64)
    folded_T = (bits_T ^ (bits_T >> 32)) & 0x7FFFFFFF
    position_T = torch.arange(1, x_T.shape[0] + 1, device=x_T.device) % 65521 + 1
    return (folded_T * position_T % 0x7FFFFFFF).sum()


def _counts(inputs: Inputs) -> Tensor | None:
    """Rows with a weight; None for all, as in a call for statistics."""
    weights = (inputs.divergence_weight_T, inputs.policy_weight_T, inputs.entropy_weight_T)
    given = [w != 0 for w in weights if w is not None]
    everything = inputs.teacher_TD is not None and inputs.divergence_weight_T is None
    return None if everything or not given else torch.stack(given).any(0)


def _constants(inputs: Inputs) -> Inputs:
    """Detached; row vectors as int64 or in the statistics' dtype."""
    changed = {name: x.detach() for name, x in vars(inputs).items() if x is not None}
    head_VD = inputs.teacher_head_VD
    if head_VD is not None and head_VD.is_set_to(inputs.head_VD):
        changed["teacher_head_VD"] = None  # the same memory: read once
    for name, x in changed.items():
        if name.endswith("_T"):
            changed[name] = x.to(torch.int64 if name == "target_T" else inputs.statistics_dtype)
    return replace(inputs, **changed)
