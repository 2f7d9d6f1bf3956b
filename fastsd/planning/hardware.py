"""Accelerators by name, and how long counted work takes on them: a range, never a measurement.

`hardware_table.toml` has the data sheets' peaks. A phase takes the time of its matrix products,
each bound by arithmetic or by the bytes it moves, of its attention, and of the bytes of everything
else, which is what eager kernels one after the other cost. What links carry is hidden behind that
at best, and added to it at worst. How much of each peak is reached is an assumption with two ends,
`ASSUMED`, printed with every plan.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastsd.errors import FastsdError
from fastsd.planning.counts import Work

TABLE = Path(__file__).with_name("hardware_table.toml")


class PlanError(FastsdError):
    """Hardware that is not known, or a plan that cannot be carried out on it."""


class Seconds(NamedTuple):
    """A range, and what most of its upper end goes to."""

    low: float
    high: float
    limit: str


class InPhases:
    """What is done in phases, one after the other."""

    seconds: tuple[Seconds, ...]

    @property
    def low(self) -> float:
        return sum(found.low for found in self.seconds)

    @property
    def high(self) -> float:
        return sum(found.high for found in self.seconds)


@dataclass(frozen=True)
class Assumed:
    """Shares of a peak, (least, most), and microseconds, (most, least)."""

    products: tuple[float, float] = (0.45, 0.75)
    attention: tuple[float, float] = (0.25, 0.60)
    memory: tuple[float, float] = (0.60, 0.85)
    link: tuple[float, float] = (0.50, 0.80)
    launch_us: tuple[float, float] = (8.0, 4.0)
    graph_us: tuple[float, float] = (3.0, 1.5)
    usable: float = 0.92

    def lines(self) -> list[str]:
        """For people."""
        shares = ("products", "attention", "memory", "link")
        said = {name: "{:.0%} to {:.0%}".format(*getattr(self, name)) for name in shares}
        return [
            f"matrix products reach {said['products']} of the peak, attention {said['attention']}",
            f"memory {said['memory']} of its bandwidth, links {said['link']} of theirs; transfers "
            "are hidden behind computing at best, and not at all at worst",
            "an operation costs {1:.0f} to {0:.0f} us to launch, {3} to {2} us inside a graph "
            "(decoding)".format(*self.launch_us, *self.graph_us),
            f"{self.usable:.0%} of a device's memory can be used",
        ]


ASSUMED = Assumed()


@dataclass(frozen=True)
class Accelerator:
    """A row of the table; units are in the file."""

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float
    node: int

    def peak(self, width: int) -> float:
        """FLOP/s at elements of `width` bytes."""
        return 1e12 * (self.bf16_tflops if width < 4 else self.fp32_tflops)


@dataclass(frozen=True)
class Fleet:
    """So many devices of one kind."""

    device: Accelerator
    count: int

    @property
    def link(self) -> float:
        """Bytes a second that each device receives when all of them exchange shards."""
        gbs = self.device.link_gbs if self.count <= self.device.node else self.device.network_gbs
        return 1e9 * gbs

    @property
    def capacity(self) -> float:
        """Bytes of one device that can be used."""
        return ASSUMED.usable * self.device.memory_gib * 2**30

    def seconds(self, work: Work) -> Seconds:
        """Of one rank's phase."""
        ends = [self._seconds(work, best) for best in (1, 0)]
        (low, _), (high, limit) = ends
        return Seconds(low, high, limit)

    def _seconds(self, work: Work, best: int) -> tuple[float, str]:
        """At one end of the assumptions, and what most of it goes to."""
        memory = self.device.memory_gbs * 1e9 * ASSUMED.memory[best]
        moved = (work.moved_bytes + work.swept_bytes) / memory
        parts = {"compute": 0.0, "bandwidth": moved, "calls": 0.0}
        for use in work.products:
            limit, seconds = self._roofline(
                use.flop, use.bytes, "products", use.product.width, best
            )
            parts[limit] += seconds
        attention = work.attention_flop, work.attention_bytes
        limit, seconds = self._roofline(*attention, "attention", work.width, best)
        parts[limit] += seconds
        if work.phase.endswith("decode"):
            parts["calls"] = 1e-6 * work.operations * ASSUMED.graph_us[best]
        else:  # launches run ahead of the device
            launches = 1e-6 * work.operations * ASSUMED.launch_us[best]
            parts["calls"] = max(0.0, launches - sum(parts.values()))
        link = work.link_bytes / (self.link * ASSUMED.link[best])
        parts["link"] = max(0.0, link - sum(parts.values())) if best else link
        return sum(parts.values()), max(parts, key=lambda name: parts[name])

    def _roofline(
        self, flop: float, moved: float, kind: str, width: int, best: int
    ) -> tuple[str, float]:
        compute = flop / (self.device.peak(width) * getattr(ASSUMED, kind)[best])
        memory = moved / (self.device.memory_gbs * 1e9 * ASSUMED.memory[best])
        return ("compute", compute) if compute >= memory else ("bandwidth", memory)


@cache
def table() -> dict[str, Accelerator]:
    """The known accelerators by name; raises PlanError for a damaged file."""
    try:
        rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))
        return {name: Accelerator(name, **row) for name, row in rows.items()}
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        known = ", ".join(field.name for field in fields(Accelerator)[1:])
        raise PlanError(f"{TABLE.name}: {error}; each table needs {known}") from error


def parse_hardware(text: str, flag: str = "--hardware") -> Fleet:
    """ "8xH100" or "H100"; raises PlanError naming what is meant instead."""
    found = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z][\w .-]*)", text.strip())
    if not found:
        here = ', or "cpu"' if flag == "--hardware" else ""
        raise PlanError(f"{flag} {text}: expected COUNTxNAME, e.g. 8xH100{here}")
    count = int(found[1] or 1)
    if count < 1:
        raise PlanError(f"{flag} {text}: the number of devices must be at least 1, e.g. 8xH100")
    known = {_plain(name): device for name, device in table().items()}
    device = known.get(_plain(found[2]))
    if device is None:
        raise PlanError(_unknown(text, flag, found[2], known))
    return Fleet(device, count)


def _unknown(text: str, flag: str, name: str, known: Mapping[str, Accelerator]) -> str:
    backwards = re.fullmatch(r"(.+?)\s*[xX*]\s*(\d+)", name)
    near = difflib.get_close_matches(
        _plain(backwards[1] if backwards else name), known, n=1, cutoff=0.5
    )
    times = f"{backwards[2]}x" if backwards else ""
    meant = f" (did you mean {times}{known[near[0]].name}?)" if near else ""
    here = ", and cpu" if flag == "--hardware" else ""
    return (
        f"{flag} {text}: no {name!r} in {TABLE.name}{meant}. There are: {', '.join(table())}{here};"
        " add a table to the file for another one"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
