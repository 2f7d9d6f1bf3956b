"""Critics: who writes the feedback. Add a critic here.

In: a configuration and its task. Out: `open_critic`, whose critic is frozen, answers greedily,
gives one critique per rollout, and never sets the reward. Other rooms also use `rule` and `text`
(critics by rule, and by any model).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastsd.config import Config
from fastsd.critics.rule import RuleCritic
from fastsd.types import Critic, Task

if TYPE_CHECKING:
    from fastsd.critics.writer import Writer
    from fastsd.types import Reward


def open_critic(
    config: Config,
    task: Task | None,
    run_dir: Path,
    reward: Reward | None = None,
    tokenizer=None,
) -> Critic | None:
    """The configured critic; None where a rule critic has no task to take its rules from.

    reward: the run's own reward function, which also says whether a critique's final answer is
    right. tokenizer: the solver's, whose special tokens no critique may hold. Without them those
    two checks are left out. Raises FastsdError where a model, endpoint or file cannot be used.
    """
    if config.critic.kind == "rule":
        return None if task is None else RuleCritic(task, config.critic)
    if config.critic.kind == "replay":
        from fastsd.critics.replay import ReplayCritic

        return ReplayCritic(config.critic, reward, tokenizer)
    from fastsd.critics.text import TextCritic

    folder = Path(config.critic.cache) if config.critic.cache else run_dir / "critiques"
    return TextCritic(_open_writer(config), config.critic, folder, reward, tokenizer)


def _open_writer(config: Config) -> Writer:
    if config.critic.kind == "local":
        from fastsd.critics.local import LocalWriter
        from fastsd.runtime import hardware

        device = hardware.resolve_device(config.device)
        return LocalWriter(
            config.critic, device, hardware.resolve_dtype(config.model.dtype, device)
        )
    from fastsd.critics.server import ServerWriter

    writer = ServerWriter(config.critic)
    writer.check()
    return writer
