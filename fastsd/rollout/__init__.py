"""Prompts to responses: sampled in this process, or drawn from vLLM servers. Add an engine here.

In: a policy, a renderer, prompts. Out: `Sampler` and `open_sampler`; `vllm` is another engine
behind the same methods. Other rooms also use `decode_steps` and `decoding` (measured for
plans).
"""

from __future__ import annotations

from pathlib import Path

from fastsd.config.sections import RolloutConfig
from fastsd.model import Policy
from fastsd.prompts.render import PromptRenderer
from fastsd.rollout.sampler import Sampler
from fastsd.rollout.vllm import VllmSampler
from fastsd.runtime.world import ALONE, World

__all__ = ["Sampler", "open_sampler"]


def open_sampler(
    policy: Policy,
    renderer: PromptRenderer,
    config: RolloutConfig,
    run_dir: Path,
    world: World = ALONE,
) -> Sampler:
    """The sampler that rollout.engine names. vllm: its weights are passed on in run_dir/served."""
    if config.engine == "vllm":
        return VllmSampler(policy, renderer, config, run_dir / "served", world)
    return Sampler(policy, renderer, config)
