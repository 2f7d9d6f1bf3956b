"""One frozen tree of settings. Impossible combinations fail here, when the configuration is read.

The embedded experiment's settings are `fastsd/tasks/chain_sum.toml`. `fastsd.cli` merges TOML
files and flags into this tree; its sections are in `fastsd.sections`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fastsd.schema import deep_merge, validate
from fastsd.sections import (
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


class Config(Section):
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

    @model_validator(mode="after")
    def _is_possible(self) -> Config:
        from fastsd.consistency import find_problems

        problems = list(dict.fromkeys(find_problems(self)))
        if problems:
            text = "; ".join(f"{problem.dotted}: {problem.message}" for problem in problems)
            raise PydanticCustomError("impossible", "{text}", {"text": text, "problems": problems})
        return self


def resolve_condition(config: Config, name: str) -> Config:
    """The settings under which condition `name` runs: its overrides merged in, none left over.

    Raises pydantic.ValidationError; `fastsd.cli.for_condition` is the same with located errors.
    """
    tree = config.model_dump(mode="json") | {"per_condition": {}, "condition": name}
    return validate(Config, deep_merge(tree, config.per_condition.get(name, {})))
