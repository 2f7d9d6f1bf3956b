"""The tree of settings: the top level, and the sections of `fastsd.config.sections` below it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fastsd.config.sections import (
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    EvalConfig,
    FilterConfig,
    GuardConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PromptConfig,
    ReportConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TeacherConfig,
)

ConditionName = Literal["grpo", "reference", "critique", "sibling", "all"]


class Settings(Section):
    """Each value is allowed; `fastsd.config.checked.Config` is one in which they go together."""

    condition: ConditionName = "critique"
    """What the self-teacher sees. all: run the three from one checkpoint and compare."""
    seed: int = 0
    """First seed."""
    seeds: int = Field(default=1, ge=1)
    """Number of seeds: seed, seed+1, ..."""
    run: str = "runs/{condition}-{time}"
    """Run folder; {condition} and {time} are filled in."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the newest valid checkpoint of the run folder, bit for bit."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0: torch's default."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    critic: CriticConfig = CriticConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    guard: GuardConfig = GuardConfig()
    eval: EvalConfig = EvalConfig()
    report: ReportConfig = ReportConfig()
    log: LogConfig = LogConfig()
    filter: FilterConfig = FilterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    per_condition: dict[str, dict[str, Any]] = {}
    """Overrides by condition, e.g. [per_condition.grpo.optim] lr = 2e-5."""
