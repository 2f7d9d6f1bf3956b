"""Decode attention against shared prefixes: one new position a row, one copy of a prompt's keys.

`reference.py` is the definition, `native.py` the C++ kernel for CPUs (csrc/decode.h), `static.py`
plain torch operations of fixed shapes for any device. In go the prompts' keys and values once and
the new position's per step, out comes its attention. Here: the public interface.
"""

from __future__ import annotations

from .cache import PrefixDecodeCache

__all__ = ["PrefixDecodeCache"]
