"""Samples that were rolled out but not yet trained on, as a checkpoint keeps them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fastsd.types import Feedback, Prompt, Rollout, Sample

_OF_FEEDBACK = ("problem", "prefix_share")


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
