"""Each wrong call is refused with the argument's name, what was found and what was expected."""

from __future__ import annotations

import pytest
import torch

from fastsd_kernels import fused_linear_loss, fused_linear_statistics
from fastsd_kernels.testing import loss_head_inputs

T, D, V = 6, 4, 9
NAN = torch.full((T,), torch.nan)
OUT_OF_RANGE = torch.tensor([0, 1, 2, V, 4, 5])

WRONG = [
    ({"student_TD": torch.zeros(T, D, dtype=torch.int64)}, TypeError, "student_TD.*int64"),
    ({"student_TD": torch.zeros(T, D, 1)}, ValueError, r"student_TD.*\[6, 4, 1\]"),
    ({"student_TD": [[0.0]]}, TypeError, "student_TD: expected a tensor, got list"),
    ({"head_VD": torch.zeros(V, D + 1)}, ValueError, r"head_VD: expected \[V, 4\].*\[9, 5\]"),
    ({"head_VD": torch.zeros(0, D)}, ValueError, "head_VD.*at least one"),
    ({"head_VD": torch.zeros(V, D).bfloat16()}, TypeError, "head_VD.*float32.*bfloat16"),
    ({"target_T": torch.zeros(T)}, TypeError, "target_T.*int64 or int32.*float32"),
    ({"target_T": torch.zeros(T + 1, dtype=torch.int64)}, ValueError, r"target_T.*\[6\].*\[7\]"),
    ({"target_T": OUT_OF_RANGE}, ValueError, "target_T.*V = 9.*got 9 at row 3"),
    ({"target_T": OUT_OF_RANGE - 1}, ValueError, "target_T.*got -1 at row 0"),
    ({"teacher_TD": torch.zeros(T - 1, D)}, ValueError, r"teacher_TD.*\[6, 4\].*\[5, 4\]"),
    ({"teacher_TD": torch.zeros(T, D).double()}, TypeError, "teacher_TD.*float32.*float64"),
    ({"teacher_TD": torch.zeros(T, D, device="meta")}, ValueError, "teacher_TD.*cpu.*meta"),
    ({"teacher_head_VD": torch.zeros(V + 1, D)}, ValueError, r"teacher_head_VD.*\[10, 4\]"),
    ({"teacher_head_VD": torch.zeros(V, D + 1)}, ValueError, r"teacher_TD.*\[6, 5\].*\[6, 4\]"),
    ({"teacher_TD": None}, ValueError, "divergence_weight_T: given without teacher_TD"),
    ({"teacher_TD": None, "teacher_head_VD": torch.zeros(V, D)}, ValueError, "teacher_head_VD"),
    ({"teacher_TD": None, "divergence_weight_T": None, "top_k": 3}, ValueError, "top_k.*teacher"),
    (
        {"teacher_TD": None, "divergence_weight_T": None, "entry_clip": 0.1},
        ValueError,
        "entry_clip.*teacher_TD",
    ),
    ({"bias_V": torch.zeros(D)}, ValueError, r"bias_V.*\[9\].*\[4\]"),
    ({"divergence_weight_T": NAN}, ValueError, "divergence_weight_T.*nan at row 0"),
    ({"policy_weight_T": NAN}, ValueError, "policy_weight_T.*nan at row 0"),
    ({"entropy_weight_T": NAN}, ValueError, "entropy_weight_T.*nan at row 0"),
    ({"old_logprob_T": NAN}, ValueError, "old_logprob_T.*nan at row 0"),
    ({"policy_weight_T": torch.zeros(T, 1)}, ValueError, r"policy_weight_T.*\[6\].*\[6, 1\]"),
    ({"policy_weight_T": None}, ValueError, "old_logprob_T: given without policy_weight_T"),
    ({"policy_weight_T": None, "old_logprob_T": None}, ValueError, "clip.*policy_weight_T"),
    ({"old_logprob_T": None}, ValueError, "clip: given without old_logprob_T"),
    ({"clip": 0.0}, ValueError, "clip.*above 0, got 0"),
    ({"divergence": "kl"}, ValueError, "divergence: expected one of forward_kl.*'kl'"),
    ({"divergence": "jsd", "beta": 1.2}, ValueError, "beta: expected 0 <= beta <= 1.*1.2"),
    ({"temperature": 0.0}, ValueError, "temperature.*got 0"),
    ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale.*inf"),
    ({"softcap": -1.0}, ValueError, "softcap.*-1"),
    ({"top_k": V + 1}, ValueError, "top_k: expected 1 <= top_k <= V = 9, got 10"),
    ({"top_k": 2.0}, TypeError, "top_k: expected an int"),
    ({"entry_clip": -0.1}, ValueError, "entry_clip"),
    ({"divergence": "sampled_token", "top_k": 3}, ValueError, "top_k: sampled_token"),
    ({"divergence": "sampled_token", "entry_clip": 1.0}, ValueError, "entry_clip: sampled_token"),
    ({"impl": "triton"}, RuntimeError, "triton.*chunked"),
    ({"impl": "fast"}, ValueError, "impl: expected one of auto.*'fast'"),
]


@pytest.mark.parametrize("change, kind, message", WRONG, ids=[w[2] for w in WRONG])
def test_refused(change, kind, message):
    x = loss_head_inputs(T, D, V, torch.float32) | {"clip": 0.2}
    with pytest.raises(kind, match=message):
        fused_linear_loss(**{**x, **change})


def test_a_loss_without_terms_is_refused():
    x = loss_head_inputs(T, D, V, torch.float32)
    with pytest.raises(ValueError, match="no terms"):
        fused_linear_loss(x["student_TD"], x["head_VD"], x["target_T"])


def test_rows_that_do_not_count_may_hold_anything():
    x = loss_head_inputs(T, D, V, torch.float32)
    weights = ("divergence_weight_T", "policy_weight_T", "entropy_weight_T")
    for name in weights:
        x[name][3] = 0
    x["target_T"] = OUT_OF_RANGE
    x["old_logprob_T"][3] = torch.nan
    assert fused_linear_loss(**x, clip=0.2).loss.isfinite()
    names = ("student_TD", "head_VD", "target_T", "teacher_TD")
    mask_T = torch.arange(T) != 3
    assert fused_linear_statistics(**{k: x[k] for k in names}, mask_T=mask_T).entropy_T[3] == 0
    with pytest.raises(ValueError, match=r"mask_T.*\[6\].*\[5\]"):
        fused_linear_statistics(**{k: x[k] for k in names}, mask_T=mask_T[1:])


def test_an_error_names_the_row_before_compaction():
    x = loss_head_inputs(T, D, V, torch.float32)
    for name in ("divergence_weight_T", "policy_weight_T", "entropy_weight_T"):
        x[name][0] = 0
    x["target_T"] = OUT_OF_RANGE
    with pytest.raises(ValueError, match="got 9 at row 3"):
        fused_linear_loss(**x)
