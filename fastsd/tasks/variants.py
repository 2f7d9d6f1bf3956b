"""What tasks of written-out additions leave to choose, and which questions they have."""

from __future__ import annotations

from fastsd.tasks import TaskError, choose


class Variants:
    """Base class of such a task.

    critic_variant: "local" judges each step on the attempt's own numbers; "continued" goes on from
        the corrected total after the first error.
    reference_phrasing: whose habit the reference solution follows, "other" or the solver's "own".
    """

    def __init__(self, critic_variant: str = "local", reference_phrasing: str = "other"):
        variants = ("local", "continued")
        self.critic_variant = choose("critic.variant", critic_variant, variants)
        phrasings = ("other", "own")
        self.reference_phrasing = choose("reference_phrasing", reference_phrasing, phrasings)


def check_place(split: str, index: int) -> None:
    """Raises TaskError unless it is question 0 or a later one of "train" or "eval"."""
    choose("split", split, ("train", "eval"))
    if index < 0:
        raise TaskError(f"index {index} of split {split}: it must be 0 or more")
