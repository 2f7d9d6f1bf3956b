"""The loss head inside torch.compile(fullgraph=True): the eager bits, one graph for all lengths."""

from __future__ import annotations

import pytest
import torch

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.testing import loss_head_inputs

LEAVES = ("student_TD", "head_VD", "bias_V")
STATISTICS = ("student_logprob_T", "entropy_T", "divergence_T", "teacher_logprob_T")
D, V = 6, 23
OPTION_SETS = [
    {},
    {"divergence": "reverse_kl", "clip": 0.2, "softcap": 2.0, "temperature": 1.3},
    {"divergence": "jsd", "beta": 0.3, "entry_clip": 0.05, "impl": "reference"},
    {"top_k": 5, "impl": "chunked"},
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self, name: str = "aot_eager"):
        self.graphs = 0
        self._backend = torch._dynamo.lookup_backend(name)

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self._backend(graph, inputs)


def whole_step(x: dict, options: dict):
    """Something before the head, the head, something after it."""
    hidden_TD = torch.tanh(x["student_TD"]) * 1.5
    out = fused_linear_loss(**{**x, "student_TD": hidden_TD}, **options)
    return out.loss * 0.5 + hidden_TD.square().mean(), out


def run(step, rows: int, options: dict, counted=slice(None), seed: int = 0) -> dict:
    x = loss_head_inputs(rows, D, V, torch.float32, seed)
    for name in ("divergence_weight_T", "policy_weight_T", "entropy_weight_T"):
        kept_T = torch.zeros(rows)
        kept_T[counted] = 1
        x[name] = x[name] * kept_T
    loss, out = step(x, options)
    loss.backward()
    found = {name: getattr(out, name) for name in STATISTICS}
    return found | {"loss": loss.detach()} | {f"d {name}": x[name].grad for name in LEAVES}


def equal(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_compiled_is_eager_to_the_bit(options):
    compiled = torch.compile(whole_step, fullgraph=True, backend="aot_eager")
    equal(run(compiled, 9, options), run(whole_step, 9, options))


def test_lengths_and_masks_share_graphs():
    backend = Counting()
    compiled = torch.compile(whole_step, fullgraph=True, backend=backend)
    for rows in (5, 9, 14, 33, 8):
        equal(run(compiled, rows, {}), run(whole_step, rows, {}))
    assert backend.graphs == 2  # one for the first length, one for any
    for counted in (slice(0, 0), slice(0, 1), slice(3, 9)):
        equal(run(compiled, 12, {}, counted), run(whole_step, 12, {}, counted))
    assert backend.graphs == 2


def test_statistics_and_no_grad():
    x = loss_head_inputs(9, D, V, torch.float32)
    names = ("student_TD", "head_VD", "target_T", "teacher_TD")

    def statistics(mask_T):
        found = fused_linear_statistics(**{k: x[k] for k in names}, mask_T=mask_T)
        return found.divergence_T * 2, found.entropy_T, found.policy_clipped_T

    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    mask_T = torch.arange(9) % 2 == 0
    for found, expected in zip(compiled(mask_T), statistics(mask_T), strict=True):
        assert found is expected is None or torch.equal(found, expected)
    with torch.no_grad():
        loss, out = torch.compile(whole_step, fullgraph=True, backend="aot_eager")(x, {})
    assert not loss.requires_grad and torch.equal(out.loss, fused_linear_loss(
        **{**x, "student_TD": torch.tanh(x["student_TD"]) * 1.5}).loss)  # fmt: skip


def test_autocast():
    def step(x, options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return whole_step(x, options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    equal(run(compiled, 9, {}), run(step, 9, {}))


WRONG = [
    ({"temperature": -1.0}, "temperature: expected a finite number above 0, got -1.0"),
    ({"divergence": "kl"}, "divergence: expected one of forward_kl"),
    ({"bias_V": torch.zeros(3)}, r"bias_V: expected \[23\]"),
    ({"old_logprob_T": None, "clip": 0.1}, "clip: given without old_logprob_T"),
    ({"impl": "fast"}, "impl: expected one of auto"),
    ({"target_T": torch.full((9,), V)}, "target_T: expected 0 <= id < V = 23.*got 23 at row 0"),
    ({"policy_weight_T": torch.full((9,), torch.nan)}, "policy_weight_T: expected finite"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[message for _, message in WRONG])
def test_errors_keep_their_message(change, message):
    x = loss_head_inputs(9, D, V, torch.float32)
    options = {name: value for name, value in change.items() if name not in x}
    x |= {name: value for name, value in change.items() if name in x}
    with pytest.raises(Exception, match=message):
        torch.compile(whole_step, fullgraph=True, backend="aot_eager")(x, options)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_inductor(options):
    """What surrounds the head is compiled for real; tanh and the mean may round differently."""
    backend = Counting("inductor")
    compiled = torch.compile(whole_step, fullgraph=True, backend=backend)
    for rows in (9, 14, 33):
        found, expected = run(compiled, rows, options), run(whole_step, rows, options)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert backend.graphs == 2
