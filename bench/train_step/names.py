"""Contestants by name: engine-precision-options, for example fastsd-bf16-critique or trl-fp32-half.

fastsd-{fp32,bf16}[-critique][-checkpointed]
trl-{fp32,autocast,bf16}[-half][-static][-checkpointed][-topk|-sampled]    see train_step_trl.py
hf-{fp32,bf16}[-static|-prefilled]                           rollouts only
"""

from __future__ import annotations

from typing import Any

PRECISIONS = {
    "fastsd": ("fp32", "bf16"),
    "trl": ("fp32", "autocast", "bf16"),
    "hf": ("fp32", "bf16"),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "fastsd": {"condition": "reference", "shared": True, "checkpointing": False},
    "trl": {"objective": "full_logits", "cache": None, "micro": 1, "checkpointing": False},
    "hf": {"cache": None},
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "fastsd": {
        "critique": {"condition": "critique"},
        "checkpointed": {"checkpointing": True},
    },
    "trl": {
        "checkpointed": {"checkpointing": True},
        "half": {"micro": 2},
        "static": {"cache": "static"},
        "topk": {"objective": "topk_logits"},
        "sampled": {"objective": "sampled_token"},
    },
    "hf": {"static": {"cache": "static"}, "prefilled": {"cache": "prefilled"}},
}
# TRL's gradients are added up over halves where whole steps would not fit beside ours.
STEPS = {
    "prompt_heavy": "fastsd-fp32,trl-fp32-half/fastsd-bf16,fastsd-bf16-critique,trl-autocast-half",
}
STEPS_ELSE = "fastsd-fp32,trl-fp32/fastsd-bf16,fastsd-bf16-critique,trl-autocast"
FLOPS = "fastsd-fp32,fastsd-bf16,fastsd-bf16-critique"
GENERATION = "fastsd-fp32,hf-fp32,hf-fp32-static/fastsd-bf16,hf-bf16,hf-bf16-static"


def settings_of(name: str) -> dict[str, Any]:
    """What the name sets; raises ValueError for one that is none."""
    engine, *rest = name.split("-")
    if engine not in DEFAULTS:
        raise ValueError(f"{name!r}: expected one of {', '.join(DEFAULTS)} first")
    if not rest or rest[0] not in PRECISIONS[engine]:
        raise ValueError(f"{name!r}: expected one of {', '.join(PRECISIONS[engine])} second")
    found = {"engine": engine, "precision": rest[0], **DEFAULTS[engine]}
    for option in rest[1:]:
        if option not in OPTIONS[engine]:
            allowed = ", ".join(OPTIONS[engine])
            raise ValueError(f"{name!r}: options of {engine} are {allowed}; found {option!r}")
        found |= OPTIONS[engine][option]
    return found


def parse_groups(text: str, engines: tuple[str, ...]) -> list[list[str]]:
    """Groups of names: commas within, slashes between. Raises ValueError for a name that is none or
    whose engine is not one of `engines`."""
    groups = [group.split(",") for group in text.split("/")]
    for name in (name for group in groups for name in group):
        if settings_of(name)["engine"] not in engines:
            raise ValueError(f"{name!r}: expected {' or '.join(engines)} here")
    return groups
