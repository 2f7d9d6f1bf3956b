"""Decode attention by the C++ library on a CPU (csrc/decode.h).

Keys and values are kept in the order in which the kernel reads them: a prefix once, packed by
`admit`; branches in one block, appended to by the kernel itself.

Shapes: B rows, N query heads, K key/value heads, H head dim, L positions of a prefix; I groups of
neighbouring rows with one prefix.
"""

from __future__ import annotations

from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from .. import native_library as lib
from .contract import CacheShape, Layers


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if it can run there, else the reason and what to do."""
    if device.type != "cpu":
        return f"native runs on CPU tensors, got {device}; use impl='torch'"
    if dtype not in lib.DTYPES:
        return f"native takes float32 and bfloat16, got {dtype}; use impl='torch' or cast"
    return lib.missing("use impl='torch'")


class NativeDecode:
    """The `Decoder` of the C++ library: fp32 and bf16 on CPUs."""

    def __init__(self, shape: CacheShape, threads: int | None):
        self.shape, self.threads = shape, threads
        layers, kv_heads, head_dim, slots, capacity, dtype = shape
        branch = lib.decode_bytes(dtype, kv_heads, head_dim, capacity)
        self.branches = lib.aligned(layers * slots * branch)
        self.prefixes: dict[int, tuple[Tensor, int]] = {}  # packed layers, positions
        self._problem = lib.Decode(
            kv_heads=kv_heads, head_dim=head_dim, branches=self.branches.data_ptr(), slots=slots,
            capacity=capacity, dtype=lib.DTYPES[dtype],
        )  # fmt: skip
        self._decode = lib.function("decode")

    def admit(self, prefix: int, layers: Layers) -> None:
        """Packs J pairs of [K, L, H] keys and values, fp32 or bf16 on the CPU, as the kernel reads
        them."""
        _, kv_heads, head_dim, _, _, dtype = self.shape
        length = layers[0][0].shape[1]
        size = lib.decode_bytes(dtype, kv_heads, head_dim, length)
        packed = lib.aligned(len(layers) * size)
        for layer, parts in enumerate(layers):
            key_KLH, value_KLH = (_unit_stride(x) for x in parts)
            part = lib.Prefix(
                key=key_KLH.data_ptr(), value=value_KLH.data_ptr(),
                key_head_stride=key_KLH.stride(0), key_stride=key_KLH.stride(1),
                value_head_stride=value_KLH.stride(0), value_stride=value_KLH.stride(1),
                kv_heads=kv_heads, head_dim=head_dim, positions=length,
                out=packed.data_ptr() + layer * size, dtype=lib.DTYPES[dtype],
                threads=self.threads or torch.get_num_threads(),
            )  # fmt: skip
            lib.call("decode_pack", part)
        self.prefixes[prefix] = packed, length

    def drop(self, prefix: int) -> None:
        """Frees the prompt's memory."""
        del self.prefixes[prefix]

    def begin(self, slot_B: np.ndarray, prefix_B: np.ndarray, length_B: np.ndarray) -> None:
        """Addresses and lengths of a step's rows and of the I groups that share a prefix.

        slot_B, prefix_B, length_B: [B] int64 each, as in `PrefixDecodeCache.begin`.
        """
        rows = len(slot_B)
        starts = np.flatnonzero(np.r_[True, prefix_B[1:] != prefix_B[:-1], True])
        prefixes = [self.prefixes[prefix] for prefix in prefix_B[starts[:-1]].tolist()]
        address_I = np.array([packed.data_ptr() for packed, _ in prefixes], np.uint64)
        length_I = np.array([length for _, length in prefixes], np.int64)
        # Kept alive with the addresses; the caller may change its own.
        self._step = (starts.astype(np.int64), address_I, length_I, slot_B.copy(), length_B.copy())
        names = ("group_start", "prefix", "prefix_length", "slot", "length")
        for name, values in zip(names, self._step, strict=True):
            setattr(self._problem, name, values.ctypes.data)
        self._problem.rows, self._problem.groups = rows, len(prefixes)
        self._problem.threads = self.threads or torch.get_num_threads()

    def attend(
        self, layer: int, query_BNH: Tensor, key_BKH: Tensor, value_BKH: Tensor, scale: float
    ) -> Tensor:
        """One call of the kernel: query_BNH [B, N, H], key_BKH, value_BKH [B, K, H], any strides.

        Returns: [B, N, H] in the query's dtype. Raises MemoryError.
        """
        p = self._problem
        query_BNH, p.query_stride = _rows(query_BNH)
        key_BKH, p.key_stride = _rows(key_BKH)
        value_BKH, p.value_stride = _rows(value_BKH)
        shape = query_BNH.shape
        out_BNH = torch.empty(shape, dtype=query_BNH.dtype)
        p.query, p.key, p.value = query_BNH.data_ptr(), key_BKH.data_ptr(), value_BKH.data_ptr()
        p.out, p.out_stride = out_BNH.data_ptr(), shape[1] * shape[2]
        p.heads, p.layer, p.scale = shape[1], layer, scale
        lib.check(self._decode(byref(p)), "decode")
        return out_BNH


def _unit_stride(x: Tensor) -> Tensor:
    return x.detach() if x.stride(2) == 1 else x.detach().contiguous()


def _rows(x_BNH: Tensor) -> tuple[Tensor, int]:
    """With heads one after the other, and how far rows are apart."""
    row, head, element = x_BNH.stride()
    if element == 1 and head == x_BNH.shape[2]:
        return x_BNH, row
    x_BNH = x_BNH.contiguous()
    return x_BNH, x_BNH.stride(0)
