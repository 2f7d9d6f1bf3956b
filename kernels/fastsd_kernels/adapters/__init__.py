"""Adapters of other codebases' trainers. Each module imports its own package; nothing else does.

In go their models and padded batches, out come hidden states, log-probs and losses of this package.
"""
