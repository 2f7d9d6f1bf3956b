"""What many ranks change in a step: weights in shards, the loss head whole or split.

As `sharding.py` does it: a layer's weights are gathered for each pass forward and backward, those
of the root (embedding, final norm, head) once a step, a teacher's copies like the student's, and
all of them once for rollouts; gradients are summed after each backward pass. A sharded head is
never gathered in training, or, where it is the embedding, for each pass; instead each rank is
given the hidden states of all ranks, and their gradient is summed in fp32.

`link_bytes` is what a rank receives: of a gathered tensor all parts but its own, of one that is
summed into parts as much, of one that every rank is to have whole twice that. A few numbers a row
(targets, weights, parts of its statistics) are not counted.

D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastsd.config import Config
from fastsd.parallel.loss_head import Head, Layout, head_layout
from fastsd.planning.counts import LogitBytes, Work, head_works
from fastsd.planning.model import ModelCounts

# Plain torch over fp32 logits, counted: reads and writes of each operation on them.
_SPLIT_LOGIT_BYTES = LogitBytes(100, 40)


@dataclass(frozen=True)
class Site:
    """Where a rank runs. kind: "cpu" or "gpu". inprocess: rollouts are made here too. teaches: the
    condition has a teacher, of this kind. head: how the loss head lies over the ranks, and why.
    reduced: bytes of an element of what gradients are summed in over ranks."""

    kind: str
    ranks: int
    inprocess: bool
    teacher: str
    teaches: bool
    head: Layout = "gathered"
    why: str = ""
    reduced: int = 4

    @property
    def copied(self) -> bool:
        """Whether the teacher has weights of its own."""
        return self.teaches and self.teacher in ("ema", "frozen")

    @property
    def splits(self) -> bool:
        """Whether each rank keeps a part of the head's vocabulary."""
        return self.ranks > 1 and self.head == "sharded"


def make_site(config: Config, model: ModelCounts, kind: str, ranks: int, teaches: bool) -> Site:
    """Raises FastsdError for a parallel.head that cannot be."""
    inprocess = config.rollout.engine == "inprocess"
    site = Site(kind, ranks, inprocess, config.teacher.kind, teaches)
    if ranks == 1:
        return site
    head = Head(
        vocabulary=model.vocabulary,
        compute_bytes=model.width,
        tied=model.tied,
        trains=model.head_trainable,
        streams=2 if teaches else 1,
        heads=2 if site.copied else 1,
        device="cpu" if kind == "cpu" else "cuda",
    )
    layout, why = head_layout(config, head, ranks)
    reduced = 4 if config.parallel.reduce_dtype == "float32" else model.width
    return replace(site, head=layout, why=why, reduced=reduced)


def over_ranks(model: ModelCounts, works: Sequence[Work], site: Site, streams: int) -> list[Work]:
    """The phases of one process's step as one rank of `site.ranks` has them."""
    if site.ranks == 1:
        return list(works)
    found = []
    for work in works:
        if site.splits and work.phase == "loss head forward":
            found += _split_head(model, work, site, streams)
        elif not (site.splits and work.phase == "loss head backward"):
            found.append(replace(work, link_bytes=_received(model, work, site)))
    share = 1 / site.ranks
    return [
        replace(work, swept_bytes=work.swept_bytes * share) if work.phase == "optimizer" else work
        for work in found
    ]


def gathered_once(model: ModelCounts, site: Site) -> int:
    """Weights that a rank has whole from the first forward of a step to its last backward."""
    if not site.splits:
        return model.root
    return 0 if model.tied else model.root - model.head_weights


def gathered_each_pass(model: ModelCounts, site: Site) -> int:
    """Weights beside the layers' that a rank gathers for each pass."""
    return model.root if site.splits and model.tied else 0


def summed(model: ModelCounts, site: Site) -> int:
    """Weights whose gradients are summed over ranks; a part of the head has its own."""
    own = site.splits and not model.tied and model.head_trainable
    return model.trainable - model.head_weights * own


def _received(model: ModelCounts, work: Work, site: Site) -> float:
    width, once = model.width, gathered_once(model, site)
    each = model.parameters - model.root + gathered_each_pass(model, site)
    weights = {
        "rollout decode": model.parameters * site.inprocess,
        "student forward": each * work.passes + once,
        "teacher forward": each * work.passes + once * site.copied,
        "student backward": each * work.passes,
    }
    moved = width * weights.get(work.phase, 0)
    if work.phase == "student backward":
        moved += site.reduced * summed(model, site) * work.passes
    return moved * (site.ranks - 1) / site.ranks


def _split_head(model: ModelCounts, forward: Work, site: Site, streams: int) -> list[Work]:
    """All ranks' rows times a part of the vocabulary. forward: the phase of a whole head."""
    rows = site.ranks * forward.tokens
    vocabulary = math.ceil(model.vocabulary / site.ranks)
    works = head_works(model, rows, forward.passes, streams, vocabulary, _SPLIT_LOGIT_BYTES)
    element = rows * model.hidden * (site.ranks - 1) / site.ranks
    moved = (streams * model.width * element, 2 * 4 * element)
    return [replace(work, link_bytes=link) for work, link in zip(works, moved, strict=True)]
