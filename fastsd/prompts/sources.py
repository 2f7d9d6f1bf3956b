"""TODO."""

from __future__ import annotations

from fastsd.conditions import CONDITIONS
from fastsd.config import Config


def required_fields(config: Config) -> dict[str, str]:
    """Prompt fields that no training row may lack, each with the reason."""
    needs = {}
    if (field := CONDITIONS[config.condition].needs) is not None:
        needs[field] = f'condition = "{config.condition}" shows it to the teacher'
    if config.reward.function in ("exact", "math"):
        needs["answer"] = f'reward.function = "{config.reward.function}" compares with it'
    return needs
