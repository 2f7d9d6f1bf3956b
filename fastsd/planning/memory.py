"""What one rank's memory holds, by part, at its fullest moment of an optimizer step.

Weights, optimizer and teacher stay. On top of them come, one after the other and never together:

    rollouts    keys and values of all rows under way, and the weights in the form decoding reads
    training    what autograd keeps of the largest micro-batch, with one layer's work or the loss
                head on top; gradients too from the second micro-batch on
    update      all gradients, beside the work of the last layer that backward reached

Backward frees a layer's activations as it makes its gradients, so in between there is never more
than at one of these ends. Sharded over n ranks, each holds 1/n of weights (fp32 where they are
trained), moments and gradients, and the gathered weights of two layers, one being fetched, and of
the root, unless the loss head is sharded too; in-process rollouts gather all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastsd.planning.model import ModelCounts
from fastsd.planning.ranks import Site, gathered_each_pass, gathered_once, summed
from fastsd.planning.rows import Step, packs

# Freed blocks that nothing later fits into, and the runtime: libraries, CUDA context, NCCL.
SLACK = 0.10
RUNTIME_BYTES = {"cpu": 0.5 * 2**30, "gpu": 1.5 * 2**30}
# Most that the loss head keeps of logits (fastsd_kernels.loss_head), and its bytes a logit pair.
_HEAD_SCRATCH = {"cpu": 240e6, "gpu": 2.0**30}
_HEAD_BYTES = {2: 4.5, 4: 8.0}
# The same of a sharded head, in fp32, and its tiles (fastsd_kernels.loss_head.sharded).
_SPLIT_SCRATCH, _SPLIT_TILES = (
    {"cpu": 2.0**28, "gpu": 2.0**30},
    {"cpu": 3 * 2.0**21, "gpu": 3 * 2.0**28},
)
# Gradients that are cast to fp32 at once (fastsd/training/optimizer.py).
_CAST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes by part and by moment. resident: held throughout; the others come on top in turn."""

    resident: Mapping[str, float]
    rollouts: Mapping[str, float]
    training: Mapping[str, float]
    update: Mapping[str, float]
    runtime: float

    @property
    def moment(self) -> str:
        """The fullest one."""
        found = {name: self._on_top(name) for name in ("rollouts", "training", "update")}
        return max(found, key=lambda name: found[name])

    @property
    def peak(self) -> float:
        """Bytes, allocator slack included."""
        held = sum(self.resident.values()) + self._on_top(self.moment)
        return self.runtime + held * (1 + SLACK)

    def over(self, *parts: str) -> float:
        """The peak without the runtime and without these resident parts."""
        left = sum(value for name, value in self.resident.items() if name not in parts)
        return (left + self._on_top(self.moment)) * (1 + SLACK)

    def _on_top(self, moment: str) -> float:
        return sum(getattr(self, moment).values())


def memory(model: ModelCounts, step: Step, site: Site) -> Memory:
    """Of one rank of a step that is counted by `count_step`."""
    gradients = _gradients(model, step, site)
    return Memory(
        resident=_resident(model, site),
        rollouts=_rollouts(model, step, site),
        training=_training(model, step, site, gradients),
        update=_update(model, step, site, gradients),
        runtime=RUNTIME_BYTES[site.kind],
    )


def _resident(model: ModelCounts, site: Site) -> dict[str, float]:
    each = model.trainable / site.ranks
    average = 4 * each if site.copied and site.teacher == "ema" else 0.0
    if site.ranks > 1:
        # A copied teacher's frozen weights are shards of its own too.
        roots = (1 + site.copied) * gathered_once(model, site)
        return {
            "weights, shards": (4 * model.trainable + model.frozen_bytes) / site.ranks,
            "weights, gathered": model.width * (roots + 2 * model.largest_layer),
            "optimizer moments": 8 * each,
            "teacher copy": site.copied * model.weight_bytes / site.ranks + average,
        }
    return {
        "weights": model.weight_bytes,
        "fp32 masters": 4.0 * model.rounded,
        "optimizer moments": 8 * each,
        "teacher copy": model.gradient_bytes * site.copied + average,
    }


def _gradients(model: ModelCounts, step: Step, site: Site) -> float:
    """All of them: bf16 ones of a second micro-batch stand beside the fp32 sums of the others."""
    if site.ranks > 1:
        return 4 * model.trainable / site.ranks + _being_summed(model, site, model.largest_layer)
    return model.gradient_bytes + (4 * model.rounded if _calls(step) > 1 else 0)


def _being_summed(model: ModelCounts, site: Site, weights: float) -> float:
    """Gradients of a unit before they are summed over ranks: whole, and in what they are summed."""
    return (model.width + site.reduced) * weights


def _calls(step: Step) -> int:
    made = packs(step)
    return made.micro_batches * made.parts


def _rollouts(model: ModelCounts, step: Step, site: Site) -> dict[str, float]:
    if not site.inprocess:
        return {}
    at = step.lengths
    rows = min(max(step.batch_rows, at.samples), step.questions * at.samples)
    questions = min(step.questions, -(-rows // at.samples) + 1)
    copies = 1 if step.shared else at.samples
    layers = model.width * (model.parameters - model.root)
    head = model.width * model.head_weights
    rest = model.width * (model.parameters - gathered_once(model, site))
    again = {"cpu": layers + head, "gpu": rest if site.ranks > 1 else 0.0}
    prefill = min(16384, questions * copies * at.question)
    return {
        "keys and values, prompts": model.kv_bytes * questions * copies * at.question,
        "keys and values, responses": model.kv_bytes * rows * at.longest_response,
        "weights for decoding": again[site.kind],
        "prefill": model.kept_layer * prefill,
        "logits": 8.0 * rows * model.vocabulary,
    }


def _training(model: ModelCounts, step: Step, site: Site, gradients: float) -> dict[str, float]:
    made = packs(step)
    responses = made.responses * step.lengths.response
    loss_head = (_split_head if site.splits else _whole_head)(model, site, responses)
    layer = model.kept_layer * max(made.student_tokens, made.teacher_tokens)
    layer += model.width * gathered_each_pass(model, site)
    questions = max(1.0, made.responses / step.lengths.samples)
    # A deferred question's keys and values are leaves in fp32, with gradients.
    read = 8 / model.width if made.deferred else float(step.live)
    return {
        "activations": model.kept * made.student_tokens,
        "one layer's work, or the loss head": max(layer, loss_head),
        "hidden states": 4.0 * model.width * model.hidden * responses,
        "shared keys and values": read * model.kv_bytes * step.lengths.question * questions,
        "gradients": gradients if _calls(step) > 1 else 0.0,
    }


def _whole_head(model: ModelCounts, site: Site, responses: float) -> float:
    head = model.width * model.head_weights
    scratch = _HEAD_BYTES[model.width] * responses * model.vocabulary
    sums = 4.0 / model.width * head if site.kind == "gpu" and model.width < 4 else 0.0
    # The head's gradient, and its product with the upstream one.
    products = 2 * head if model.head_trainable else 0.0
    return min(_HEAD_SCRATCH[site.kind], scratch) + sums + products


def _split_head(model: ModelCounts, site: Site, responses: float) -> float:
    """A part of the vocabulary, all ranks' rows."""
    rows, part = site.ranks * responses, model.head_weights / site.ranks
    streams = 2 if site.teaches else 1
    scratch = 4.0 * streams * rows * model.vocabulary / site.ranks
    scratch = min(_SPLIT_SCRATCH[site.kind], scratch) + min(_SPLIT_TILES[site.kind], scratch)
    # Rows of each stream, and the student's gradient: of a chunk in fp32, of all as they are.
    hidden = model.hidden * rows * (model.width * (streams + 1) + 4)
    # The part in the compute type, its gradient in fp32 and cast to it.
    return scratch + hidden + part * (model.width + (4 + model.width) * model.head_trainable)


def _update(model: ModelCounts, step: Step, site: Site, gradients: float) -> dict[str, float]:
    """The embedding's gradient comes last and dense, and is added to a tied head's."""
    # A checkpointed layer's activations come again, beside their gradients.
    layer = (1 + model.checkpoints) * model.kept_layer * packs(step).student_tokens
    embedding = model.width * model.head_weights * model.head_trainable
    if site.ranks > 1:
        root = summed(model, site) - (model.trainable - model.root_trainable)
        gradients = 4 * model.trainable / site.ranks
        embedding = _being_summed(model, site, max(root, model.largest_layer))
        embedding += model.width * gathered_each_pass(model, site)
    casts = _CAST_BYTES if model.width < 4 else 0.0
    return {"gradients": gradients, "one layer's work": max(layer + embedding, casts)}


def largest_micro_batch(model: ModelCounts, step: Step, site: Site, capacity: float) -> int | None:
    """The largest optim.micro_batch_tokens whose peak fits into `capacity` bytes; at most what a
    step has. None where a single response does not fit."""

    def fits(budget: int) -> bool:
        return memory(model, replace(step, budget=budget), site).peak <= capacity

    whole = packs(replace(step, budget=2**62))
    least, most = 1, max(1, int(max(whole.student_tokens, whole.teacher_tokens)))
    if fits(most):
        return most
    if not fits(least):
        return None
    while most - least > max(1, least // 256):
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def most_rows(model: ModelCounts, step: Step, site: Site, capacity: float) -> int | None:
    """The most rollout.batch_rows (whole groups) that fit; None where one group does not."""
    samples = step.lengths.samples

    def fits(groups: int) -> bool:
        found = memory(model, replace(step, batch_rows=groups * samples), site)
        held = sum(found.resident.values()) + sum(found.rollouts.values())
        return found.runtime + held * (1 + SLACK) <= capacity

    groups = max(1, min(step.questions, step.batch_rows // samples))
    while groups and not fits(groups):
        groups -= 1
    return groups * samples or None
