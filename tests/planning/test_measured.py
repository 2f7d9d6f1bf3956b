"""The planner's rates of this machine: each is of the work that it is used for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import build_tiny_llama, build_tiny_qwen3

from fastsd.config.sections import ModelConfig
from fastsd.planning import rollout_rates
from fastsd.planning.counts import ADAMW_BYTES, count_step
from fastsd.planning.measured import MeasuredCpu
from fastsd.planning.model import ModelCounts, count_model
from fastsd.planning.rollout_rates import Streams, decode_rates
from fastsd.planning.rows import Lengths, Step
from fastsd.planning.timing import Rate, span, times, total
from fastsd.planning.training_rates import product_rates, swept_rate

AT = Lengths(question=24, feedback=18, response=9, samples=4, longest_response=9)
STEP = Step(AT, 2, "group", True, 16384, True, 256)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelCounts]:
    root = tmp_path_factory.mktemp("models")
    folders = {"llama": build_tiny_llama(root / "llama"), "qwen3": build_tiny_qwen3(root / "qwen3")}
    return {
        name: count_model(ModelConfig(name=str(folder)), torch.float32)
        for name, folder in folders.items()
    }


def test_a_rate_is_from_the_fastest_round_to_the_median():
    assert span([3.0, 1.0, 2.0]) == Rate(1.0, 2.0)
    assert times(Rate(1, 2), 3) == Rate(3, 6) and total([Rate(1, 2), Rate(3, 4)]) == Rate(4, 6)


def test_every_product_of_a_phase_has_its_rate(models):
    works = {work.phase: work for work in count_step(models["llama"], STEP)}
    for phase in ("student forward", "teacher forward", "student backward"):
        rates = product_rates(models["llama"], works[phase])
        assert set(rates) == {use.product for use in works[phase].products}
        assert all(0 < each.low <= each.high for each in rates.values())


def test_weights_are_read_whole_head_and_all(models):
    model = models["llama"]
    streams = Streams(model, torch.float32)
    layers = sum(p.outer * p.inner * count for p, count in model.forward.products)
    assert streams._bytes == 4 * (layers + model.head_weights)
    packing, read, multiply = streams.packing(), streams.read(2), streams.multiply(24)
    assert 0 < read.low <= read.high and 0 < multiply.low and packing.low >= 0


def test_the_optimizer_is_timed_at_its_own_bytes(models, monkeypatch):
    """Halved counts of bytes would be doubled seconds a byte."""
    monkeypatch.setattr("fastsd.planning.training_rates.rate", lambda run, units: (run(), units))
    large = replace(models["llama"], trainable=1000)
    assert swept_rate(large)[1] == ADAMW_BYTES * 1000


def test_layers_of_more_operations_take_more_calls(models, monkeypatch):
    def timed(model, rows, dtype, layers):
        return Rate(1.0 + layers, 2.0 + layers)

    monkeypatch.setattr(rollout_rates, "_sampler_rate", timed)
    step, layer = decode_rates(models["llama"], 4, torch.float32)
    assert step == Rate(1.0, 2.0) and layer.low == pytest.approx(1.0, rel=0.1)
    _, more = decode_rates(models["qwen3"], 4, torch.float32)  # norms of queries and keys
    assert more.low > 1.15 * layer.low


def test_a_range_has_its_low_end_first(models):
    """A step's cost is a difference of two rates, whose ends may cross."""
    zero = Rate(0.0, 0.0)
    rates = dict.fromkeys(MeasuredCpu.__dataclass_fields__, zero)
    rates |= {"products": {}, "packed_bytes": 0.0, "layers": 2, "attention": (zero, zero)}
    cpu = MeasuredCpu(**{**rates, "decode_step": Rate(2.0, 1.0)})
    works = {work.phase: work for work in count_step(models["llama"], STEP)}
    found = cpu.seconds(works["rollout decode"])
    assert found.low == works["rollout decode"].passes and found.high == 2 * found.low
    assert found.limit == "calls"


def test_a_tied_head_adds_two_gradients(models):
    backward = {
        tied: next(
            work
            for work in count_step(replace(models["llama"], tied=tied), STEP)
            if work.phase == "student backward"
        )
        for tied in (True, False)
    }
    more = backward[True].swept_bytes - backward[False].swept_bytes
    assert more == 3 * 4 * models["llama"].head_weights
