"""The tree of settings: TOML files and flags in, one checked `Config` out.

Other rooms also import `sections` (one class a section), `checked` (what a condition runs under),
`flags`, `schema` and `load` (errors with file and line). A setting is added in `sections`.
"""

from fastsd.config.checked import Config
from fastsd.config.load import ConfigError, dump_toml, for_condition, load_config

__all__ = ["Config", "ConfigError", "dump_toml", "for_condition", "load_config"]
