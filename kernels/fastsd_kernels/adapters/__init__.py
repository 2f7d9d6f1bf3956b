"""Adapters of other codebases' trainers. Each module imports its own package; nothing else does."""
