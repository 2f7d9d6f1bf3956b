"""All that a resumed run needs to go on exactly, as a checkpoint keeps it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsd.checkpoint import LoadedCheckpoint
from fastsd.checkpoint.matches import (
    binding_settings,
    parameter_shapes,
    refuse_other_data,
    refuse_other_model,
    refuse_other_settings,
)
from fastsd.types import Feedback, Prompt, Rollout, Sample

if TYPE_CHECKING:
    from fastsd.training.session import Session

_OF_FEEDBACK = ("problem", "prefix_share")


def state_of(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and JSON values, beside the model's own weights."""
    tensors = {f"optimizer/{k}": v for k, v in session.optimizer.state_tensors().items()}
    if session.teacher is not None:
        tensors |= {f"teacher/{k}": v for k, v in session.teacher.state_tensors().items()}
    tensors["torch_rng"] = torch.get_rng_state()
    return tensors, {
        "step": session.step,
        "cursor": session.cursor,
        "optimizer": session.optimizer.state_json(),
        "guard": session.guard.state_json(),
        "buffer": [sample_to_json(sample) for sample in session.buffer],
        "config": binding_settings(session.config),
        "model": parameter_shapes(session.policy.model),
    }


def load_state(session: Session, found: LoadedCheckpoint) -> None:
    """The inverse. Raises CheckpointError where the checkpoint is another experiment's."""
    refuse_other_settings(found.path, found.state["config"], session.config)
    refuse_other_model(found.path, found.state.get("model"), session.policy.model)
    session.optimizer.load(found.tensors.part("optimizer/"), found.state["optimizer"])
    if session.teacher is not None:
        session.teacher.load_state_tensors(found.tensors.part("teacher/"))
    session.guard.load(found.state["guard"])
    torch.set_rng_state(found.tensors.whole("torch_rng"))
    session.step, session.cursor = found.state["step"], found.state["cursor"]
    session.buffer = _buffer(session, found)


def _buffer(session: Session, found: LoadedCheckpoint) -> list[Sample]:
    """The samples that were rolled out but not yet trained on."""
    records = found.state["buffer"]
    if not records:
        return []
    rollout = session.config.rollout
    count = rollout.prompts_per_step * rollout.steps_per_batch
    prompts = session.train_data.take(session.cursor - count, count, session.config.seed)
    by_id = {prompt.id: prompt for prompt in prompts}
    refuse_other_data(found.path, records, by_id)
    return [sample_from_json(record, by_id[record["prompt"]]) for record in records]


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """A sample as JSON gives it back, but for the prompt, of which it keeps the id, and the step
    that feedback changes first, which no loss asks for."""
    record = asdict(replace(sample, rollout=replace(sample.rollout, prompt=None)))  # type: ignore[arg-type]
    del record["rollout"]["prompt"]
    given = record["feedback"]
    kept = {name: given[name] for name in _OF_FEEDBACK}
    record |= {"feedback": given["text"], **kept, "dropped": record.pop("dropped")}
    return {"prompt": sample.rollout.prompt.id, **record}


def sample_from_json(record: dict[str, Any], prompt: Prompt) -> Sample:
    """Inverse of `sample_to_json`; the prompt is taken from the data."""
    fields = {k: v for k, v in record.items() if k not in ("prompt", "rollout")}
    for name in ("student_ids", "teacher_ids"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    rollout = dict(record["rollout"])
    for name in ("response_ids", "logprobs"):
        rollout[name] = tuple(rollout[name])
    given = {name: fields.pop(name) for name in _OF_FEEDBACK}
    fields["feedback"] = Feedback(fields["feedback"], **given)
    return Sample(rollout=Rollout(prompt=prompt, **rollout), **fields)
