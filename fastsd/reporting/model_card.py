"""The README.md of a trained checkpoint: what it is, how good, with its intervals and limits.

Names and settings in it may be anybody's: each is escaped for a Markdown line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastsd.evaluation.summary import difference_rows, limits_of, score_headers, score_rows
from fastsd.records.folder import RunFolderError
from fastsd.reporting.page import environment
from fastsd.reporting.runs import Run, read_run
from fastsd.runtime.files import replace_text


def _tables(run: Run) -> dict[str, Any]:
    """What the model card shows of the comparison."""
    summary = run.summary
    return {
        "summary": summary,
        "score_headers": score_headers(summary) if summary else [],
        "scores": score_rows(summary) if summary else [],
        "differences": difference_rows(summary) if summary else [],
        "limits": limits_of_run(run),
    }


def limits_of_run(run: Run) -> list[str]:
    """What must be said beside the run's result."""
    task = run.config.get("data", {}).get("task")
    return run.summary["limits"] if run.summary else limits_of(task)


def write_model_card(run_dir: Path | str, checkpoint_dir: Path | str) -> Path:
    """Write <run>/README.md, the model card of one checkpoint of the run, and return its path.

    It names the checkpoint by its folder's name and states results with their intervals and limits.
    """
    run, checkpoint = read_run(run_dir), Path(checkpoint_dir).name
    if not re.fullmatch(r"[\w.-]+", checkpoint):
        raise RunFolderError(
            f"a checkpoint folder's name may hold [A-Za-z0-9_.-]; got {checkpoint!r}"
        )
    config = run.config
    model = config.get("model", {}).get("name", "") or "a causal language model"
    condition = config.get("condition", next(iter(run.children)))
    names = ("teacher.kind", "loss.divergence", "optim.lr", "optim.steps", "rollout.temperature")
    settings = [("condition", condition)]
    for section, field in (name.split(".") for name in names):
        if field in config.get(section, {}):
            settings.append((f"{section}.{field}", config[section][field]))
    text = (
        environment()
        .get_template("model_card.md.j2")
        .render(
            **_tables(run),
            base=model,
            hub_base=model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None,
            condition=condition,
            description=DESCRIPTIONS.get(condition, DESCRIPTIONS["other"]),
            checkpoint=checkpoint,
            settings=settings,
        )
    )
    path = run.folder / "README.md"
    replace_text(path, re.sub(r"\n{3,}", "\n\n", text))
    return path


DESCRIPTIONS = {
    "grpo": "Trained by GRPO on the correctness of its own answers.",
    "reference": "Trained by on-policy self-distillation: on its own answers, towards the same "
    "model shown a reference solution.",
    "critique": "Trained by on-policy self-distillation: on its own answers, towards the same "
    "model shown a step-aligned critique of each answer.",
    "other": "Trained with fastsd.",
}
