"""What one rank's memory holds, by part, at its fullest moment of an optimizer step.

Weights, optimizer and teacher stay. On top of them come, one after the other and never together:

    rollouts    keys and values of all rows under way, and the weights in the form decoding reads
    training    what autograd keeps of the largest micro-batch, with one layer's work or the loss
                head on top; gradients too from the second micro-batch on
    update      all gradients, beside the work of the last layer that backward reached

Backward frees a layer's activations as it makes its gradients, so in between there is never more
than at one of these ends. Sharded over n ranks, each holds 1/n of the fp32 weights, moments and
gradients, and the gathered weights of the root and of two layers, one being fetched; in-process
rollouts gather all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastsd.plan_model import ModelCounts
from fastsd.plan_rows import Step, packs

# Freed blocks that nothing later fits into, and the runtime: libraries, CUDA context, NCCL.
SLACK = 0.10
RUNTIME_BYTES = {"cpu": 0.5 * 2**30, "gpu": 1.5 * 2**30}
# Most that the loss head keeps of logits (fastsd_kernels.loss_head), and its bytes a logit pair.
_HEAD_SCRATCH = {"cpu": 240e6, "gpu": 2.0**30}
_HEAD_BYTES = {2: 4.5, 4: 8.0}
# Gradients that are cast to fp32 at once (fastsd/optimizer.py).
_CAST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Site:
    """Where a rank runs. kind: "cpu" or "gpu". inprocess: rollouts are made here too."""

    kind: str
    ranks: int
    inprocess: bool
    teacher: str
    teaches: bool


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
        update=_update(model, step, gradients),
        runtime=RUNTIME_BYTES[site.kind],
    )


def _resident(model: ModelCounts, site: Site) -> dict[str, float]:
    each = model.trainable / site.ranks
    copied = site.teaches and site.teacher in ("ema", "frozen")
    average = 4 * each if copied and site.teacher == "ema" else 0.0
    if site.ranks > 1:
        return {
            "weights, fp32 shards": 4 * model.parameters / site.ranks,
            "weights, gathered": model.width * (model.root + 2 * model.largest_layer),
            "optimizer moments": 8 * each,
            "teacher copy": 4 * each * copied + average,
        }
    return {
        "weights": model.weight_bytes,
        "fp32 masters": 4.0 * model.rounded,
        "optimizer moments": 8 * each,
        "teacher copy": model.gradient_bytes * copied + average,
    }


def _gradients(model: ModelCounts, step: Step, site: Site) -> float:
    """All of them: bf16 ones of a second micro-batch stand beside the fp32 sums of the others."""
    if site.ranks > 1:
        return 4 * model.trainable / site.ranks + (4 + model.width) * model.largest_layer
    return model.gradient_bytes + (4 * model.rounded if _calls(step) > 1 else 0)


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
    head = model.width * model.vocabulary * model.hidden
    again = {"cpu": layers + head, "gpu": layers if site.ranks > 1 else 0.0}
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
    head = model.width * model.vocabulary * model.hidden
    scratch = _HEAD_BYTES[model.width] * responses * model.vocabulary
    sums = 4.0 / model.width * head if site.kind == "gpu" and model.width < 4 else 0.0
    # The head's gradient, and its product with the upstream one.
    loss_head = min(_HEAD_SCRATCH[site.kind], scratch) + sums
    loss_head += 2 * head if model.head_trainable else 0.0
    layer = model.kept_layer * max(made.student_tokens, made.teacher_tokens)
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


def _update(model: ModelCounts, step: Step, gradients: float) -> dict[str, float]:
    """The embedding's gradient comes last and dense, and is added to a tied head's."""
    # A checkpointed layer's activations come again, beside their gradients.
    layer = (1 + model.checkpoints) * model.kept_layer * packs(step).student_tokens
    embedding = model.width * model.vocabulary * model.hidden * model.head_trainable
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
