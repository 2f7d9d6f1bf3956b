"""The student's and the teacher's passes over one micro-batch, what they share computed once.

A group that does not fit into one pass goes in parts. Its prefix, the question, goes first: forward
without gradient, its keys and values kept as leaf tensors. Every part reads them, so every part's
backward adds to their gradients. After the last part the prefix runs forward once more, now with
gradient, and what the leaves gathered goes backward through it:

    dL/dw = sum over parts of dL/dw, keys held fixed  +  dL/dkeys . dkeys/dw

which is exact. The prefix's last token is never among the leaves: its hidden state predicts the
first token of every branch, so each part computes it anew, gradient and all. With c units for a
forward and backward (3, or 4 with gradient checkpointing) the prefix costs 1 + c however many parts
there are; computed anew in each of them it costs 2c or more, so it is always deferred.

The teacher's prefix (question, and feedback where the group has one) is computed once for the group
too; a live teacher, whose weights are the student's, goes on from the student's question.

Shapes: T response tokens of a part, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd.errors import FastsdError
from fastsd.model import Policy
from fastsd.model.micro_batches import MicroBatch, student_trees, teacher_trees
from fastsd.model.packing import PrefixKeys, count_tokens
from fastsd.runtime.phases import PhaseClock
from fastsd.teachers.self_teacher import Teacher
from fastsd.types import Sample, TokenTree


class DeferredPrefix:
    """A prefix whose backward waits for those of the parts that read its keys and values.

    keys: leaf tensors, to be read by other forwards; fp32 or better, so that the gradients of many
    parts add up. tree: the prefix alone.
    """

    def __init__(self, policy: Policy, tree: TokenTree):
        self.tree = tree
        self.keys = PrefixKeys()
        self._policy = policy
        with torch.no_grad():
            policy.hidden([tree], fills=self.keys)
        for layer, (key, value) in self.keys.layers.items():
            self.keys.layers[layer] = (_leaf(key), _leaf(value))

    def backward(self) -> None:
        """Adds the prefix's share to the parameters' gradients."""
        again = PrefixKeys(graph=True)
        self._policy.hidden([self.tree], fills=again)
        computed: list[Tensor] = []
        gradients: list[Tensor] = []
        for layer, leaves in self.keys.layers.items():
            for leaf, tensor in zip(leaves, again.layers[layer], strict=True):
                # Below the first trainable weight nothing depends on one.
                if leaf.grad is not None and tensor.requires_grad:
                    computed.append(tensor)
                    gradients.append(leaf.grad.to(tensor.dtype))
        torch.autograd.backward(computed, gradients)


class Passes:
    """Hidden states of a micro-batch's parts; `student` of a part before `teacher` of it.

    teacher: None where nothing is distilled. clock: seconds and tokens go to its phases.
    """

    def __init__(
        self, policy: Policy, teacher: Teacher | None, batch: MicroBatch, clock: PhaseClock
    ):
        self._policy, self._teacher, self._clock = policy, teacher, clock
        self._deferred = batch.deferred
        self._prefix: DeferredPrefix | None = None
        # What the teacher's next forward reads.
        self._known: PrefixKeys | None = None
        if batch.deferred:
            self._run_student_prefix(batch.samples)
            self._run_teacher_prefix(_taught(batch.samples))

    def student(self, part: Sequence[Sample]) -> Tensor:
        """hidden_TD of the part's response tokens."""
        trees = student_trees(part)
        reads = self._prefix.keys if self._prefix is not None else None
        fills = None
        if self._reads_student and not self._deferred:
            fills = self._known = PrefixKeys()
        with self._clock.phase("student", *count_tokens(trees, reads)):
            return self._policy.hidden(trees, reads, fills)

    def teacher(self, part: Sequence[Sample], like_TD: Tensor) -> Tensor | None:
        """hidden_TD without gradient: zeros for a sample without teacher, None if all are.

        Raises FastsdError where like_TD, the student's, has other rows than the part.
        """
        _check_rows(like_TD, part)
        taught = _taught(part)
        if self._teacher is None or not taught:
            return None
        trees = teacher_trees(taught)
        with self._clock.phase("teacher", *count_tokens(trees, self._known)):
            hidden_TD = self._teacher.hidden(trees, self._known)
        if len(taught) == len(part):
            return hidden_TD
        has_teacher = torch.tensor([sample.teacher_ids is not None for sample in part])
        lengths = torch.tensor([len(sample.rollout.response_ids) for sample in part])
        rows_T = has_teacher.repeat_interleave(lengths).to(like_TD.device)
        return torch.zeros_like(like_TD).masked_scatter(rows_T[:, None], hidden_TD)

    def finish(self) -> None:
        """After the last part's backward: the deferred one, where there is one."""
        if self._prefix is not None:
            with self._clock.phase("student", *count_tokens([self._prefix.tree])):
                self._prefix.backward()

    @property
    def _reads_student(self) -> bool:
        return self._teacher is not None and self._teacher.shares_weights

    def _run_student_prefix(self, samples: Sequence[Sample]) -> None:
        tree = _all_but_last(student_trees(samples))
        if tree is not None:
            with self._clock.phase("student", *count_tokens([tree])):
                self._prefix = DeferredPrefix(self._policy, tree)

    def _run_teacher_prefix(self, taught: Sequence[Sample]) -> None:
        tree = _all_but_last(teacher_trees(taught)) if self._teacher is not None else None
        if self._teacher is None or tree is None:
            return
        student = self._prefix.keys if self._reads_student and self._prefix is not None else None
        keys = PrefixKeys()
        with self._clock.phase("teacher", *count_tokens([tree], student)):
            self._teacher.hidden([tree], student, keys)
        self._known = keys


def _all_but_last(trees: Sequence[TokenTree]) -> TokenTree | None:
    """The prefix of a group's only tree, without its last token; None where nothing is left."""
    prefix = trees[0].prefix_ids[:-1] if trees else ()
    return TokenTree(prefix, ()) if prefix else None


def _taught(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.teacher_ids is not None]


def _leaf(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()


def _check_rows(like_TD: Tensor, part: Sequence[Sample]) -> None:
    rows = sum(len(sample.rollout.response_ids) for sample in part)
    if len(like_TD) != rows:
        raise FastsdError(
            f"like_TD: expected {rows} rows, the response tokens of {len(part)} samples, found "
            f"{len(like_TD)}; pass what `student` returned for the same part"
        )
