"""The public cache: checks arguments once, then hands them to an implementation.

Shapes: B rows, N query heads, K key/value heads, H head dim, L positions of a prefix.
"""

from __future__ import annotations

from math import inf
from operator import index

import numpy as np
import torch
from torch import Tensor

from . import native
from .contract import CacheShape, Decoder, Layers
from .native import NativeDecode
from .static import StaticDecode


class PrefixDecodeCache:
    """Keys and values of decoding rows: one copy per prefix, one preallocated branch per slot.

    A row is one sequence that gets one new position a step. It attends to its prefix, to the
    positions it has added so far and to the new one:

        out_b = sum_s P_s v_s,   P = softmax over those s of scale * q_b . k_s

    The calls of a rollout: `admit` every prompt's keys and values, then per step `begin` and one
    `attend` per layer; `drop` a prompt when its last row has finished. Inference only: no gradient
    flows through `attend`.

    impl: what runs, "native" or "torch".
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        slots: int,
        max_new_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        impl: str = "auto",
        threads: int | None = None,
    ):
        """
        Args:
            layers: how many layers call `attend`.
            kv_heads, head_dim: of keys and values alike, the same in all layers.
            slots: how many branches there is memory for, layers x slots x max_new_tokens x
                2 x kv_heads x head_dim elements of `dtype` in all.
            max_new_tokens: positions that a branch can hold.
            dtype: of queries, keys, values and results.
            device: where they are.
            impl: "native" (the C++ library, CPU, fp32 and bf16), "torch" (any device and floating
                point dtype, fixed shapes: a CUDA graph can hold `attend`) or "auto", native where
                it can run, else torch. A named one never falls back.
            threads: of the native kernel, default torch.get_num_threads() at each call.

        Raises: ValueError naming the argument; RuntimeError with the reason where impl="native"
            cannot run.
        """
        sizes = (layers, kv_heads, head_dim, slots, max_new_tokens)
        for name, size in zip(CacheShape._fields, sizes, strict=False):
            if index(size) < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating point dtype, got {dtype}")
        if threads is not None and index(threads) < 1:
            raise ValueError(f"threads: expected at least 1 or None, got {threads}")
        self.shape = CacheShape(*sizes, dtype)
        self.device = torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        self.impl = implementation_name(impl, self.device, dtype)
        self._decoder: Decoder
        if self.impl == "native":
            self._decoder = NativeDecode(self.shape, threads)
        else:
            self._decoder = StaticDecode(self.shape, self.device)
        self._prefixes: set[int] = set()
        # Shape of a step's keys; no rows while none has begun.
        self._expected = (0, kv_heads, head_dim)

    @property
    def capacity(self) -> tuple[int, ...]:
        """What the shapes inside `attend` depend on besides the number of rows.

        A CUDA graph that holds `attend` is valid while this has not changed since its capture. For
        impl="torch": prefixes, positions of a prefix, rows of one prefix; else empty.
        """
        return self._decoder.capacity if isinstance(self._decoder, StaticDecode) else ()

    def admit(self, prefix: int, layers: Layers) -> None:
        """Copies a prompt's keys and values: per layer [K, L, H] each, L >= 0 and alike.

        prefix: any integer, the prompt's name in `begin` and `drop`. A step must `begin` after.
        Raises: ValueError naming what does not fit; MemoryError.
        """
        if prefix in self._prefixes:
            raise ValueError(f"prefix: {prefix} is admitted already; drop it first")
        if len(layers) != self.shape.layers:
            raise ValueError(f"layers: expected {self.shape.layers} layers, got {len(layers)}")
        length = layers[0][0].shape[1] if layers[0][0].ndim == 3 else 0
        expected = (self.shape.kv_heads, length, self.shape.head_dim)
        for layer, (key_KLH, value_KLH) in enumerate(layers):
            self._check(f"layers[{layer}] key_KLH", key_KLH, expected)
            self._check(f"layers[{layer}] value_KLH", value_KLH, expected)
        self._expected = (0, *self._expected[1:])
        self._decoder.admit(index(prefix), layers)
        self._prefixes.add(index(prefix))

    def drop(self, prefix: int) -> None:
        """Forgets a prompt. A step must `begin` after. Raises ValueError if it is not here."""
        if prefix not in self._prefixes:
            raise ValueError(f"prefix: {prefix} was not admitted or has been dropped")
        self._expected = (0, *self._expected[1:])
        self._prefixes.remove(prefix)
        self._decoder.drop(prefix)

    def begin(
        self,
        slot_B: np.ndarray | Tensor,
        prefix_B: np.ndarray | Tensor,
        length_B: np.ndarray | Tensor,
    ) -> None:
        """Names the rows of the next step, before its first `attend`.

        slot_B: each row's branch, all different, below `slots`. prefix_B: each row's prefix; rows
        of one prefix are neighbours. length_B: how many positions the row has added before; the
        new one is stored at that index. All int64 on the CPU. A branch starts at length 0, and
        what its slot held before does not matter.

        Raises: TypeError or ValueError naming the argument.
        """
        slot_B = _indices("slot_B", slot_B)
        prefix_B = _indices("prefix_B", prefix_B)
        length_B = _indices("length_B", length_B)
        for name, x in (("prefix_B", prefix_B), ("length_B", length_B)):
            if x.shape != slot_B.shape:
                raise ValueError(f"{name}: expected {len(slot_B)} rows as in slot_B, got {len(x)}")
        self._expected = (0, *self._expected[1:])
        _check_range("slot_B", slot_B, "slots", self.shape.slots)
        _check_range("length_B", length_B, "max_new_tokens", self.shape.max_new_tokens)
        if np.bincount(slot_B).max() > 1:
            raise ValueError(f"slot_B: a slot is listed twice: {slot_B.tolist()}")
        starts = np.flatnonzero(np.r_[True, prefix_B[1:] != prefix_B[:-1]])
        groups = prefix_B[starts].tolist()
        unknown = [prefix for prefix in groups if prefix not in self._prefixes]
        if unknown:
            raise ValueError(f"prefix_B: {unknown[0]} was not admitted or has been dropped")
        if len(set(groups)) < len(groups):
            raise ValueError("prefix_B: rows of one prefix must be neighbours; sort the rows by it")
        self._decoder.begin(slot_B, prefix_B, length_B)
        self._expected = (len(slot_B), *self._expected[1:])

    def attend(
        self, layer: int, query_BNH: Tensor, key_BKH: Tensor, value_BKH: Tensor, scale: float
    ) -> Tensor:
        """Stores the new position's key and value, returns its attention, [B, N, H].

        Each layer once a step. N is a multiple of K: query head n reads head n // (N / K). Any
        strides. A row's result depends on that row alone; for "native" to the bit.

        Raises: RuntimeError if no step has begun since the last `admit` or `drop`, or if a tensor
            needs a gradient; ValueError or TypeError naming the argument; MemoryError.
        """
        rows, kv_heads, head_dim = self._expected
        if not rows:
            raise RuntimeError("attend: no step has begun; call begin after admit and drop")
        if not 0 <= layer < self.shape.layers:
            raise ValueError(f"layer: expected 0 to {self.shape.layers - 1}, got {layer}")
        if not 0 < scale < inf:
            raise ValueError(f"scale: expected a positive finite number, got {scale}")
        shape = query_BNH.shape
        heads = shape[1] if len(shape) == 3 else 0
        if heads == 0 or heads % kv_heads:
            raise ValueError(
                f"query_BNH: expected [{rows}, N, {head_dim}] with N a multiple of {kv_heads}, "
                f"got {list(shape)}"
            )
        self._check("query_BNH", query_BNH, (rows, heads, head_dim))
        self._check("key_BKH", key_BKH, self._expected)
        self._check("value_BKH", value_BKH, self._expected)
        if torch.is_grad_enabled():
            _refuse_gradient(query_BNH=query_BNH, key_BKH=key_BKH, value_BKH=value_BKH)
        return self._decoder.attend(layer, query_BNH, key_BKH, value_BKH, scale)

    def _check(self, name: str, x: Tensor, expected: tuple[int, ...]) -> None:
        if x.shape != expected:
            other = x.ndim == 3 and x.shape[2] != expected[2]
            why = "; keys and values of unlike head dims (MLA) are not supported" if other else ""
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(x.shape)}{why}")
        # Not x.device: that takes 0.4 us, and each layer of a step comes here.
        if x.dtype != self.shape.dtype or x.is_cpu != self._on_cpu:
            raise TypeError(
                f"{name}: expected {self.shape.dtype} on {self.device}, got {x.dtype} on {x.device}"
            )


def implementation_name(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Raises ValueError for an unknown name, RuntimeError with why native cannot run."""
    if impl not in ("auto", "native", "torch"):
        raise ValueError(f"impl: expected 'auto', 'native' or 'torch', got {impl!r}")
    if impl == "torch":
        return impl
    reason = native.why_not(device, dtype)
    if reason is None:
        return "native"
    if impl == "native":
        raise RuntimeError(f"impl='native' cannot run: {reason}")
    return "torch"


def _refuse_gradient(**given: Tensor) -> None:
    for name, x in given.items():
        if x.requires_grad:
            raise RuntimeError(f"{name}: attend has no gradient; call it under torch.no_grad")


def _indices(name: str, x: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(x, Tensor):
        if x.device.type != "cpu":
            raise TypeError(f"{name}: expected numpy or a CPU tensor, got one on {x.device}")
        x = x.numpy()
    if not isinstance(x, np.ndarray) or x.dtype != np.int64:
        found = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"{name}: expected int64 numpy array or CPU tensor, got {found}")
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{name}: expected one dimension, at least one row, got {list(x.shape)}")
    return np.ascontiguousarray(x)


def _check_range(name: str, x: np.ndarray, limit_name: str, limit: int) -> None:
    bad = x[(x < 0) | (x >= limit)]
    if len(bad):
        raise ValueError(f"{name}: expected 0 to {limit - 1} ({limit_name} - 1), got {bad[0]}")
