"""What every command opens: a model that answers questions, and what judges its answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from fastsd.checkpoint import manifest
from fastsd.config import Config, load_config
from fastsd.config.flags import parse_flags
from fastsd.config.load import PRESET
from fastsd.critics import open_critic
from fastsd.model import Policy, load_policy
from fastsd.model.loading import model_path
from fastsd.model.refusals import longest_sequence
from fastsd.prompts.render import PromptRenderer
from fastsd.prompts.sources import DataSource, load_held_out, load_training
from fastsd.rewards.functions import load_reward
from fastsd.rollout import open_sampler
from fastsd.runtime import hardware
from fastsd.runtime.world import ALONE, World
from fastsd.tasks import load_task
from fastsd.tasks.answers import extract_answer
from fastsd.types import Critic, Task


class Solver:
    """A policy with its questions, its reward, its sampler and, when first asked for, its critic.

    The order of opening is part of a run's bits: a policy draws its fresh adapters from torch's
    random state. What is cheap to find wrong comes before the model.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        needs: Mapping[str, str] = MappingProxyType({}),
        world: World = ALONE,
        held_out: bool = True,
        check: Callable[[DataSource], None] = lambda source: None,
    ):
        """folder: where a model critic keeps its replies and servers find the weights. needs:
        fields that no training row may lack, with the reason. held_out: whether the questions to
        evaluate on are read. check: raises what else is wrong with the training data, before the
        model is loaded. Raises FastsdError for whatever cannot be opened."""
        self.config, self.folder = config, folder
        if config.threads:
            torch.set_num_threads(config.threads)
        device = hardware.resolve_device(config.device, world.local_rank)
        dtype = hardware.resolve_dtype(config.model.dtype, device)
        self.task = _open_task(config)
        self.train_data = load_training(config.data, self.task, config.seed, needs)
        check(self.train_data)
        if held_out:
            self.eval_prompts = load_held_out(config.data, self.task, needs)
        self.reward = load_reward(config.reward, self.task)
        self.policy = load_policy(config.model, device, dtype)
        self.renderer = renderer_for(self.policy, config)
        self.sampler = open_sampler(self.policy, self.renderer, config.rollout, folder, world)

    @functools.cached_property
    def critic(self) -> Critic | None:
        """The configured critic, opened when it is first asked for: it may be a model."""
        judge = {"reward": self.reward, "tokenizer": self.policy.tokenizer}
        return open_critic(self.config, self.task, self.folder, **judge)

    def answer_of(self, text: str) -> str | None:
        """The answer that votes in maj@k."""
        return self.task.answer(text) if self.task else extract_answer(text)


def renderer_for(policy: Policy, config: Config) -> PromptRenderer:
    """A renderer whose prompts leave the model room for the longest response.

    Raises ModelError where not even a response fits.
    """
    longest, response = longest_sequence(policy.config), config.rollout.max_new_tokens
    policy.check_length(1 + response)
    return PromptRenderer(
        policy.tokenizer, config.prompt, room=None if longest is None else longest - response
    )


def _open_task(config: Config) -> Task | None:
    """The configured procedural task, with the critic's variant; None for data from files."""
    if config.data.task is None:
        return None
    options = dict(config.data.task_options)
    return load_task(config.data.task, critic_variant=config.critic.variant, **options)


def answering(config: Config) -> Config:
    """The same configuration for a model that only answers: whole weights of which nothing is
    trained, sampled in this process."""
    plain = {"lora": None, "freeze": [], "gradient_checkpointing": False}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=plain),
            "rollout": config.rollout.model_copy(update={"engine": "inprocess"}),
        }
    )


def checkpoint_config(checkpoint: str, words: Sequence[str]) -> Config:
    """The configuration that evaluates `checkpoint`; `words` are TOML files and flags.

    Without a file: the config.resolved.toml beside the checkpoint or one folder up, else the
    embedded experiment if the checkpoint is its shipped base. Adapters are merged into a
    checkpoint's weights. Raises ConfigError where that leaves something unset.
    """
    folder = Path(model_path(checkpoint)).resolve()
    files = parse_flags(words).files
    if not files:
        near = (parent / "config.resolved.toml" for parent in list(folder.parents)[:2])
        base = [PRESET] if folder == Path(model_path("chain_sum")).resolve() else []
        files = [str(file) for file in [*filter(Path.exists, near), *base][:1]]
        words = [*files, *words]
    return answering(load_config([*words, "--model.name", checkpoint]).config)


def refuse_damaged(config: Config) -> None:
    """Raises CheckpointError where the model is a checkpoint of ours with a file missing or
    changed."""
    folder = Path(model_path(config.model.name))
    if (folder / manifest.MANIFEST).exists():
        manifest.verify(folder)
