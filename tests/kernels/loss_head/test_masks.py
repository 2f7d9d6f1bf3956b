"""Generated masks: finite, zero where nothing counts, a graph always, padding changes no bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.loss_head import chunked
from fastsd_kernels.testing import loss_head_inputs

D, V = 6, 23
LEAVES = ("student_TD", "head_VD", "bias_V")
WEIGHTS = ("divergence_weight_T", "policy_weight_T", "entropy_weight_T")
STATISTICS = ("divergence_T", "student_logprob_T", "teacher_logprob_T", "entropy_T")
OPTIONS = st.fixed_dictionaries(
    {"divergence": st.sampled_from(["forward_kl", "reverse_kl", "jsd"])},
    optional={
        "top_k": st.integers(1, V),
        "tail": st.booleans(),
        "entry_clip": st.sampled_from([1e-3, 0.1]),
        "softcap": st.just(2.0),
        "clip": st.just(0.2),
    },
) | st.just({"divergence": "sampled_token"})


def run(x, **options):
    leaves = {name: x[name].detach().clone().requires_grad_() for name in LEAVES}
    out = fused_linear_loss(**{**x, **leaves}, **options)
    assert out.loss.requires_grad
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def padded(x, keep_T, dtype):
    """Rows of x at keep_T among rows that do not count and hold NaN and wrong targets."""
    total = keep_T.shape[0]
    wide = {name: x[name] for name in ("head_VD", "bias_V")}
    for name, value in x.items():
        if name in wide:
            continue
        filler = 0.0 if name in WEIGHTS else torch.nan
        row = value.new_full((total, *value.shape[1:]), -100 if name == "target_T" else filler)
        row[keep_T] = value.detach()
        wide[name] = row
    return wide


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    mask=st.lists(st.booleans(), max_size=40),
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    impl=st.sampled_from(["auto", "chunked"]),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 1 << 30),
)
def test_masked_rows_change_nothing(mask, options, dtype, impl, chunk, seed):
    keep_T = torch.tensor(mask, dtype=torch.bool)
    rows = int(keep_T.sum())
    x = loss_head_inputs(rows, D, V, dtype, seed)
    before = chunked.SCRATCH_BYTES["cpu"]
    chunked.SCRATCH_BYTES["cpu"] = chunk * 2 * V * 8
    try:
        plain, plain_gradients = run(x, impl=impl, **options)
        wide, wide_gradients = run(padded(x, keep_T, dtype), impl=impl, **options)
    finally:
        chunked.SCRATCH_BYTES["cpu"] = before
    assert wide.loss.isfinite() and torch.equal(wide.loss, plain.loss)
    if rows == 0:
        assert wide.loss.item() == 0
    for name in STATISTICS:
        found, expected = getattr(wide, name), getattr(plain, name)
        assert found.isfinite().all(), name
        assert torch.equal(found[keep_T], expected), name
        assert not found[~keep_T].any(), name
    assert not wide_gradients["student_TD"][~keep_T].any()
    wide_gradients["student_TD"] = wide_gradients["student_TD"][keep_T]
    for name, gradient in wide_gradients.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, plain_gradients[name]), name
