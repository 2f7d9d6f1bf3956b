"""Critics: who writes the feedback. `open_critic` makes the one that a configuration names.

A critic is frozen, answers greedily, gives one critique per rollout, and never sets the reward.
"""

from __future__ import annotations

from pathlib import Path

from fastsd.config import Config
from fastsd.critics.rule import RuleCritic
from fastsd.types import Critic, Task


def open_critic(config: Config, task: Task | None, run_dir: Path) -> Critic | None:
    """The configured critic; None where a rule critic has no task to take its rules from."""
    return None if task is None else RuleCritic(task, config.critic)
