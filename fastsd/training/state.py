"""All that a resumed run needs to go on exactly, as a checkpoint keeps it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

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
from fastsd.training.parts import Parts
from fastsd.types import Feedback, Prompt, Rollout, Sample

_OF_FEEDBACK = ("problem", "prefix_share")


def state_of(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and JSON values, beside the model's own weights."""
    tensors = {f"optimizer/{k}": v for k, v in parts.optimizer.state_tensors().items()}
    if parts.teacher is not None:
        tensors |= {f"teacher/{k}": v for k, v in parts.teacher.state_tensors().items()}
    tensors["torch_rng"] = torch.get_rng_state()
    return tensors, {
        "step": parts.step,
        "cursor": parts.cursor,
        "optimizer": parts.optimizer.state_json(),
        "guard": parts.guard.state_json(),
        "buffer": [sample_to_json(sample) for sample in parts.buffer],
        "config": binding_settings(parts.config),
        "model": parameter_shapes(parts.policy.model),
    }


def load_state(parts: Parts, found: LoadedCheckpoint) -> None:
    """The inverse. Raises CheckpointError where the checkpoint is another experiment's."""
    refuse_other_settings(found.path, found.state["config"], parts.config)
    refuse_other_model(found.path, found.state.get("model"), parts.policy.model)
    parts.optimizer.load(found.tensors.part("optimizer/"), found.state["optimizer"])
    if parts.teacher is not None:
        parts.teacher.load_state_tensors(found.tensors.part("teacher/"))
    parts.guard.load(found.state["guard"])
    torch.set_rng_state(found.tensors.whole("torch_rng"))
    parts.step, parts.cursor = found.state["step"], found.state["cursor"]
    parts.buffer = _buffer(parts, found)


def _buffer(parts: Parts, found: LoadedCheckpoint) -> list[Sample]:
    """The samples that were rolled out but not yet trained on."""
    records = found.state["buffer"]
    if not records:
        return []
    rollout = parts.config.rollout
    count = rollout.prompts_per_step * rollout.steps_per_batch
    prompts = parts.train_data.take(parts.cursor - count, count, parts.config.seed)
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
