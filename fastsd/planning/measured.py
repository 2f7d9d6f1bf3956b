"""The machine that this runs on as a hardware entry: its rates, measured at the model's shapes.

A processor has no one rate for matrix products: thin ones are slower, and what decoding reads from
memory differs from what lies in cache. So every product of each phase is timed in its order
(`training_rates.py`), the sampler's weights in theirs (`rollout_rates.py`), beside the loss head
over a part of the vocabulary, attention over the group's own tree, AdamW, an elementwise product,
and layers so narrow that only their calls take time, in a forward and in the sampler's own loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastsd.planning.counts import Work
from fastsd.planning.hardware import Seconds
from fastsd.planning.model import ModelCounts
from fastsd.planning.rollout_rates import Streams, decode_attention_rate, decode_rates
from fastsd.planning.rows import Step
from fastsd.planning.timing import Rate, times, total
from fastsd.planning.trace import Product
from fastsd.planning.training_rates import (
    attention_rates,
    head_rate,
    moved_rate,
    operation_rate,
    product_rates,
    swept_rate,
)


@dataclass(frozen=True)
class MeasuredCpu:
    """Rates of this machine; `seconds` of any phase that they were measured for."""

    products: Mapping[str, Mapping[Product, Rate]]  # by phase: a FLOP
    head: Rate  # a FLOP of the loss head, its row sums included
    prefill: Rate  # a FLOP of a prefill
    packing: Rate  # a byte of weights, packed for a batch of rollouts
    packed_bytes: float
    stream: Rate  # a byte of weights, read by a decode step
    keys: Rate  # a byte of keys and values, read by a decode step
    decode_step: Rate  # a step: its bookkeeping and its draws
    decode_layer: Rate  # a layer of a step: its calls
    layers: int
    attention: tuple[Rate, Rate]  # a FLOP forward, backward
    moved: Rate  # a byte of hidden states
    swept: Rate  # a byte of the optimizer's state, or of gradients of the embedding
    operation: Rate

    def seconds(self, work: Work) -> Seconds:
        """The phase's range and its largest part."""
        if work.phase.startswith("loss head"):
            return _seconds({"compute": times(self.head, work.flop)})
        swept = times(self.swept, work.swept_bytes)
        parts = {"bandwidth": total([times(self.moved, work.moved_bytes), swept])}
        if work.phase.endswith("decode"):
            packing = times(self.packing, self.packed_bytes)
            parts["bandwidth"] = total([parts["bandwidth"], packing, *self._streams(work)])
            each = total([self.decode_step, times(self.decode_layer, self.layers)])
            parts["calls"] = times(each, work.passes)
        else:
            backward = work.phase.endswith("backward")
            attention = times(self.attention[backward], work.attention_flop)
            parts["compute"] = total([self._products(work), attention])
            parts["calls"] = times(self.operation, work.operations)
        return _seconds(parts)

    def _products(self, work: Work) -> Rate:
        if work.phase.endswith("prefill"):
            return times(self.prefill, sum(use.flop for use in work.products))
        rates = self.products.get(work.phase, {})
        return total([times(rates[use.product], use.flop) for use in work.products])

    def _streams(self, work: Work) -> list[Rate]:
        weights = sum(use.bytes for use in work.products)
        return [times(self.stream, weights), times(self.keys, work.attention_bytes)]


def _seconds(parts: Mapping[str, Rate]) -> Seconds:
    low, high = sorted(total(list(parts.values())))
    return Seconds(low, high, max(parts, key=lambda name: parts[name].high))


def measure_cpu(model: ModelCounts, step: Step, works: Sequence[Work], dtype) -> MeasuredCpu:
    """Measures in some seconds what `works` need."""
    by_phase = {work.phase: work for work in works}
    side_by_side = _rows(by_phase, "rollout decode")
    per_step, per_layer = decode_rates(model, side_by_side, dtype)
    streams = Streams(model, dtype)
    prefill, stream = (
        streams.multiply(_rows(by_phase, "rollout prefill")),
        streams.read(side_by_side),
    )
    packing = streams.packing()
    del streams  # a model's weights, twice
    return MeasuredCpu(
        products={
            name: product_rates(model, work)
            for name, work in by_phase.items()
            if name.startswith(("student", "teacher"))
        },
        head=head_rate(model, _rows(by_phase, "loss head forward"), step.teacher, dtype),
        prefill=prefill,
        packing=packing,
        packed_bytes=_packed_bytes(model),
        keys=decode_attention_rate(model, step, side_by_side, dtype),
        stream=stream,
        decode_step=per_step,
        decode_layer=per_layer,
        layers=model.layers,
        attention=attention_rates(model, step, dtype),
        moved=moved_rate(model, _rows(by_phase, "student forward"), dtype),
        swept=swept_rate(model),
        operation=operation_rate(),
    )


def _packed_bytes(model: ModelCounts) -> float:
    """Of the linear layers and the head; experts are not packed."""
    plain = [(p, times) for p, times in model.forward.products if p.experts == 1]
    weights = sum(p.outer * p.inner * times for p, times in [*plain, (model.head, 1)])
    return float(model.width * weights)


def _rows(works: Mapping[str, Work], phase: str) -> int:
    """Of one call of a phase; one where it does not run here."""
    work = works.get(phase)
    return max(1, round(work.tokens / max(work.passes, 1))) if work else 1
