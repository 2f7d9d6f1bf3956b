"""fastsd: on-policy self-distillation, fast. Start with `python -m fastsd.train --help`."""

__version__ = "0.1.0"
