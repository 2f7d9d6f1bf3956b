"""The tree of settings. A setting is added in `sections`.

In: TOML files and flags. Out: `load_config`, one checked `Config`. Other rooms also use `sections`
(one class a section), `checked` (what a condition runs under), `flags`, `schema` and `load` (errors
with file and line).
"""

from fastsd.config.checked import Config
from fastsd.config.load import ConfigError, dump_toml, for_condition, load_config

__all__ = ["Config", "ConfigError", "dump_toml", "for_condition", "load_config"]
