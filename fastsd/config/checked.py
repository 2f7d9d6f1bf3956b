"""One frozen tree of settings. Impossible combinations fail here, when the configuration is read.

The embedded experiment's settings are `fastsd/tasks/chain_sum.toml`. `fastsd.config.load` merges
TOML files and flags into this tree.
"""

from __future__ import annotations

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from fastsd.config.consistency import find_problems
from fastsd.config.schema import deep_merge, validate
from fastsd.config.tree import Settings


class Config(Settings):
    @model_validator(mode="after")
    def _is_possible(self) -> Config:
        problems = list(dict.fromkeys(find_problems(self, resolve_condition)))
        if problems:
            text = "; ".join(f"{problem.dotted}: {problem.message}" for problem in problems)
            raise PydanticCustomError("impossible", "{text}", {"text": text, "problems": problems})
        return self


def resolve_condition(config: Config, name: str) -> Config:
    """The settings under which condition `name` runs: its overrides merged in, none left over.

    Raises pydantic.ValidationError; `fastsd.config.load.for_condition` is the same with located
    errors.
    """
    tree = config.model_dump(mode="json") | {"per_condition": {}, "condition": name}
    return validate(Config, deep_merge(tree, config.per_condition.get(name, {})))
