"""How large each update is."""

from __future__ import annotations

import math

from fastsd.config.sections import OptimConfig


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of the step-th call (from 0): linear warm-up, then constant or cosine.

    Warm-up reaches lr at its last step: lr * (step + 1) / warmup_steps. The cosine is
    lr * (1 + cos(pi * p)) / 2 with p = (step - warmup_steps) / (steps - warmup_steps): lr right
    after the warm-up, zero as the last step ends.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
