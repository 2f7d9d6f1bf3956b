"""What test_loss_head_sharded.py runs on 2 and 3 ranks: inputs, options and what ranks do wrong."""

from __future__ import annotations

import itertools

import torch

from fastsd_kernels.testing import loss_head_inputs

T, D, V = 37, 16, 63
CHUNK_ROWS = 10  # as in the worker
# In bf16 another factor would round the gradients once more than the budget has it.
UPSTREAM = {torch.float64: -1.7, torch.float32: -1.7, torch.bfloat16: 1.0}
SIZES = {2: [40, 23], 3: [41, 1, 21]}


def every_option():
    for divergence, top_k, clip in itertools.product(
        ("forward_kl", "reverse_kl", "jsd"), (None, (7, True), (7, False)), (None, 0.05)
    ):
        options = {"divergence": divergence, "beta": 0.3, "entry_clip": clip}
        yield options | ({"top_k": top_k[0], "tail": top_k[1]} if top_k else {})
    yield {"divergence": "sampled_token"}
    yield {"divergence": "jsd", "beta": 0.0}
    yield {"divergence": "jsd", "beta": 1.0, "top_k": 50}  # more than the smaller shards hold
    yield {"softcap": 2.0, "temperature": 1.3, "logit_scale": 0.7, "clip": 0.2}
    yield {"divergence": "reverse_kl", "top_k": V, "temperature": 0.6, "clip": 0.2}


OPTIONS = list(every_option())


def inputs(dtype=torch.float64, without=(), rows=T, **changes) -> dict[str, torch.Tensor]:
    x = {k: v.detach() for k, v in loss_head_inputs(rows, D, V, dtype).items()}
    return {k: v for k, v in (x | changes).items() if k not in without}


def equal_streams(dtype) -> dict[str, torch.Tensor]:
    weights = ("divergence_weight_T", "policy_weight_T", "old_logprob_T", "entropy_weight_T")
    x = inputs(dtype, without=weights)
    return x | {"teacher_TD": x["student_TD"].clone()}


def some_rows_count() -> dict[str, torch.Tensor]:
    """Every third row counts; the others hold NaN and targets that are no tokens."""
    x = inputs()
    for name, value in x.items():
        if name.endswith(("_TD", "_T")):
            value[torch.arange(T) % 3 != 0] = 0 if "weight" in name else -100
    x["student_TD"][1::3] = torch.nan
    return x


def own_teacher_head() -> dict[str, torch.Tensor]:
    wide = loss_head_inputs(T, 2 * D, V, seed=5)
    return inputs(teacher_TD=wide["student_TD"], teacher_head_VD=wide["head_VD"].detach())


def extreme(scale: float) -> dict[str, torch.Tensor]:
    x = inputs(torch.float32)
    for name in ("student_TD", "teacher_TD", "head_VD"):
        x[name] = x[name] / x[name].norm(dim=-1, keepdim=True)
    return x | {"student_TD": x["student_TD"] * scale, "teacher_TD": x["teacher_TD"] * scale}


TEACHER = ("teacher_TD", "divergence_weight_T")
WEIGHTS = ("divergence_weight_T", "policy_weight_T", "entropy_weight_T")
NONE_COUNT = {name: torch.zeros(T) for name in WEIGHTS}
FIRST_DROPPED = {name: inputs()[name] * (torch.arange(T) > 0) for name in WEIGHTS}
NARROW = {k: v.float() for k, v in inputs().items() if k.endswith(("_TD", "_VD"))}

OTHER_CASES = {
    "no teacher": (inputs(without=TEACHER), {"clip": 0.2}),
    "policy gradient, no bias": (
        inputs(without=(*TEACHER, "old_logprob_T", "entropy_weight_T", "bias_V")),
        {},
    ),
    "weights of one": (inputs(without=("old_logprob_T", *WEIGHTS)), {}),
    "rows dropped": (some_rows_count(), {"clip": 0.2}),
    "nothing counts": (inputs(**NONE_COUNT), {"clip": 0.2, "top_k": 5}),
    "no rows": (inputs(rows=0), {"entry_clip": 0.05}),
    "one row": (inputs(rows=1), {"divergence": "jsd"}),
    "teacher's own head": (own_teacher_head(), {"divergence": "reverse_kl"}),
}
METERED = {"whole": {}, "partial": {"reduce_hidden_gradient": False}}
STATISTICS = [{"divergence": "reverse_kl"}, {"top_k": 5}, {"entry_clip": 0.01}]
SCALES = [30.0, 1e4]
# What rank 1 passes instead, and the error of the others, or of both.
MISMATCHES = {
    "rows": ({"inputs": inputs(rows=T - 1)}, "student_TD: expected the same.*37 rows.*36 rows"),
    "width": ({"inputs": {"student_TD": torch.zeros(T, D + 1).double()}}, r"head_shard_VD.*17\]"),
    "dtype": ({"inputs": NARROW}, "dtype: expected the same.*float64.*float32"),
    "temperature": (
        {"options": {"temperature": 2.0}},
        "temperature:.*1.0 on rank 0, 2.0 on rank 1",
    ),
    "top_k": ({"options": {"top_k": 3}}, "top_k:.*None on rank 0, 3 on rank 1"),
    "reduction": ({"options": {"reduce_hidden_gradient": False}}, "reduce_hidden_gradient:.*False"),
    "targets": ({"inputs": {"target_T": torch.arange(T)}}, "target_T:.*checksum"),
    "which rows count": ({"inputs": FIRST_DROPPED}, "student_TD:.*37 rows that.*36 rows that"),
    "weights": ({"inputs": {"policy_weight_T": torch.ones(T)}}, "policy_weight_T:.*checksum"),
    "a term": ({"inputs": {"bias_V": None}}, "bias_V: expected the same.*None on rank 1"),
    "a frozen head": ({"frozen": ("head_VD",)}, "gradient of head_shard_VD:.*False on rank 1"),
    "function": (
        {"call": "statistics", "inputs": dict.fromkeys((*WEIGHTS, "old_logprob_T"))},
        "function:.*loss on rank 0, statistics on rank 1",
    ),
    "gap": ({"options": {"vocabulary_start": 39}}, r"vocabulary_start:.*\[39, "),
    "start": ({"options": {"vocabulary_start": "40"}}, "vocabulary_start: expected an int.*str"),
}
# Arguments that are wrong on every rank alike: inputs, options, error.
WRONG = {
    "target": ({"target_T": torch.full((T,), V)}, {}, "target_T: expected 0 <= id < V = 63"),
    "top_k": ({}, {"top_k": V + 1}, "top_k: expected 1 <= top_k <= V = 63, got 64"),
    "divergence": ({}, {"divergence": "kl"}, "divergence: expected one of"),
    "weight": ({"policy_weight_T": torch.full((T,), torch.nan)}, {}, "policy_weight_T.*nan at row"),
    "terms": ({"policy_weight_T": None}, {}, "old_logprob_T: given without policy_weight_T"),
}


def every_case(ranks: int) -> dict[str, dict]:
    """By name, what the worker runs."""
    cases, tiny = {}, {"tiny": True}
    for options in OPTIONS:
        cases[f"{torch.float64} {options}"] = {"inputs": inputs(), "options": options} | tiny
        for dtype in (torch.float32, torch.bfloat16):
            cases[f"{dtype} {options}"] = {"inputs": inputs(dtype), "options": options}
        if ranks == 3:
            same = {k: v for k, v in options.items() if k != "clip"}
            for dtype in (torch.float32, torch.bfloat16):
                x = equal_streams(dtype)
                cases[f"equal {dtype} {options}"] = {"inputs": x, "options": same}
            for scale in SCALES:
                cases[f"extreme {scale} {options}"] = {"inputs": extreme(scale), "options": options}
    for name, (x, options) in OTHER_CASES.items():
        cases[name] = {"inputs": x, "options": options} | tiny
    cases["scale 8"] = {"inputs": inputs(torch.float32), "options": {"logit_scale": 8.0}}
    cases["other order"] = {"inputs": inputs(), "options": {}, "order": [*range(1, ranks), 0]}
    for name, options in METERED.items():
        cases[name] = {"inputs": inputs(), "options": options, "metered": True} | tiny
    for options in STATISTICS:
        x = inputs(without=("old_logprob_T", *WEIGHTS), mask_T=torch.arange(T) % 3 > 0)
        case = {"inputs": x, "options": options, "call": "statistics", "metered": True}
        cases[f"statistics {options}"] = case | tiny
    for name, (own, _) in MISMATCHES.items():
        cases[f"mismatch {name}"] = {"inputs": inputs(), "options": {}, "by_rank": {1: own}}
    for name, (change, options, _) in WRONG.items():
        cases[f"wrong {name}"] = {"inputs": inputs(**change), "options": options}
    for case in cases.values():
        case |= {"sizes": SIZES[ranks], "upstream": UPSTREAM[case["inputs"]["student_TD"].dtype]}
    return cases
