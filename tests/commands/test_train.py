"""One optimizer step against the definition, and what must never happen in one."""

import copy
import json

import pytest
import torch
from small_runs import LORA, SMALL, run_small, small_config

from fastsd.model.micro_batches import MicroBatch, micro_batches
from fastsd.runtime.phases import PHASES
from fastsd.train import update
from fastsd.training.loss import TokenWeights
from fastsd.training.session import Session


def session_of(tmp_path, condition, **overrides):
    return Session(small_config(condition, **overrides), tmp_path)


def kept_gradients(session, samples):
    """The gradients that `update` would step with."""
    found = {}
    step = session.optimizer.step

    def capture():
        found.update({n: p.grad.clone() for n, p in session.optimizer.parameters.items()})
        return step()

    session.optimizer.step = capture
    statistics = update(session, samples)
    return found, statistics


def log_probs(policy, prompt_ids, response_ids, temperature):
    """The definition: full rows through the plain Hugging Face model, full logits."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = policy.model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)


def definition(session, samples):
    """L of fastsd/training/loss.py, term by term, sample by sample."""
    config, maker = session.config, session.maker
    lengths = {id(s): len(s.rollout.response_ids) for s in samples}
    taught = sum(lengths[id(s)] for s in samples if s.teacher_ids is not None)
    rewarded = sum(lengths[id(s)] for s in samples if s.rollout.reward is not None)
    total = torch.zeros(())
    for s in samples:
        response = torch.tensor(s.rollout.response_ids)
        student = log_probs(
            session.policy, s.student_ids, s.rollout.response_ids, config.rollout.temperature
        )
        picked = student.gather(-1, response[:, None])[:, 0]
        if s.teacher_ids is not None:
            with torch.no_grad():
                policy = session.teacher.policy
                teacher = log_probs(
                    policy, s.teacher_ids, s.rollout.response_ids, config.rollout.temperature
                )
            pairs = {"reverse_kl": (student, teacher), "forward_kl": (teacher, student)}
            first, second = pairs[config.loss.divergence]
            divergence = (first.exp() * (first - second)).sum()
            total = total + maker.weights[0] * divergence / taught
        ratio = (picked - torch.tensor(s.rollout.logprobs)).exp()
        clipped = ratio.clamp(1 - config.loss.clip, 1 + config.loss.clip)
        surrogate = torch.minimum(ratio * s.advantage, clipped * s.advantage).sum()
        total = total - maker.weights[1] * surrogate / rewarded
        entropy = -(student.exp() * student).sum()
        total = total - config.loss.entropy_weight * entropy / sum(lengths.values())
    return total


CASES = [
    ("grpo", "frozen", {}),
    ("grpo", "frozen", {"entropy_weight": 0.01}),
    ("reference", "frozen", {}),
    ("critique", "live", {"divergence": "forward_kl"}),
    ("critique", "ema", {"policy_weight": 0.5, "divergence_weight": 0.3}),
]


@pytest.mark.parametrize(("condition", "teacher", "loss"), CASES)
@pytest.mark.parametrize("micro_batch_tokens", [60, 100_000])
def test_step_equals_the_definition(condition, teacher, loss, micro_batch_tokens, tmp_path):
    session = session_of(
        tmp_path,
        condition,
        teacher={"kind": teacher},
        loss=loss,
        optim={"steps": 6, "micro_batch_tokens": micro_batch_tokens},
        rollout={"prompts_per_step": 4, "samples_per_prompt": 4, "temperature": 1.3},
    )
    samples = session.next_samples()
    assert any(s.advantage for s in samples)
    want_loss = definition(session, samples)
    names = list(session.optimizer.parameters)
    want = torch.autograd.grad(want_loss, list(session.optimizer.parameters.values()))
    got, statistics = kept_gradients(session, samples)
    # fp32 model, ~300 tokens: a few thousand roundings of 6e-8 relative to the largest entry.
    assert abs(statistics.metrics()["loss"] - want_loss.item()) <= 1e-5
    for name, gradient in zip(names, want, strict=True):
        assert (got[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-8, name


@pytest.mark.parametrize("condition", ["grpo", "reference", "critique"])
def test_micro_batches_change_nothing_but_rounding(condition, tmp_path):
    """Groups at once, several and in parts: gradients, metrics, each sample's divergence."""
    found = {}
    for budget in (100_000, 250, 60, 1):
        session = session_of(
            tmp_path,
            condition,
            teacher={"kind": "live"},
            optim={"micro_batch_tokens": budget},
            rollout={"prompts_per_step": 6, "samples_per_prompt": 4, "temperature": 1.3},
        )
        samples = session.next_samples()
        batches = micro_batches(samples, budget)
        assert (len(batches) > 1) == (budget <= 250)
        assert any(batch.deferred for batch in batches) == (budget <= 60)
        gradients, statistics = kept_gradients(session, samples)
        metrics = statistics.metrics()
        for role in ("student", "teacher"):
            full = metrics.pop(f"tokens/{role}", 0) + metrics.pop(f"tokens_saved/{role}", 0)
            metrics[f"full rows/{role}"] = full
        other = ("time", "memory", "tokens_per_s", "sharing", "rollout")
        metrics = {name: x for name, x in metrics.items() if name.split("/")[0] not in other}
        found[budget] = gradients, metrics, [statistics.divergence(i) for i in range(len(samples))]
    want = found.pop(100_000)
    for gradients, metrics, divergences in found.values():
        assert metrics == pytest.approx(want[1], rel=1e-4, abs=1e-7)
        assert divergences == [x if x is None else pytest.approx(x, rel=1e-4) for x in want[2]]
        for name, gradient in want[0].items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_teacher_never_gets_gradient_and_dropout_is_off(tmp_path):
    session = session_of(tmp_path, "critique", teacher={"kind": "live"})
    for module in session.policy.model.modules():
        assert not isinstance(module, torch.nn.Dropout) or module.p == 0.0
        assert getattr(module, "attention_dropout", 0.0) == 0.0
    frozen = session_of(tmp_path, "critique", teacher={"kind": "frozen"})
    samples = session.next_samples()
    live_gradients, _ = kept_gradients(session, samples)
    frozen_gradients, _ = kept_gradients(frozen, frozen.next_samples())
    # Before the first update both teachers hold the same weights. The live one reads the student's
    # questions, so its products have other shapes and round differently: measured 4e-6.
    for name, gradient in frozen_gradients.items():
        error = (live_gradients[name] - gradient).abs().max()
        assert error <= 2e-5 * gradient.abs().max(), name
    passes = session.passes(MicroBatch((tuple(samples),)), teaches=True)
    student_TD = passes.student(samples)
    teacher_TD = passes.teacher(samples, student_TD)
    assert student_TD.requires_grad and not teacher_TD.requires_grad
    assert all(not p.requires_grad for p in frozen.teacher.policy.model.parameters())


def test_groups_without_spread_contribute_nothing(tmp_path):
    session = session_of(tmp_path, "grpo", reward={"function": "task"})
    session.reward = lambda prompts, completions, **columns: [1.0] * len(prompts)
    before = copy.deepcopy(session.policy.model.state_dict())
    statistics = update(session, session.next_samples())
    assert statistics.metrics()["skipped"] == 1.0 and statistics.tokens == 0
    assert session.step == 1
    after = session.policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_none_rewards_are_no_signal(tmp_path):
    session = session_of(tmp_path, "grpo")
    judge = session.reward

    def some_missing(prompts, completions, **columns):
        scores = judge(prompts=prompts, completions=completions, **columns)
        return [None if i % 4 == 0 else score for i, score in enumerate(scores)]

    session.reward = some_missing
    samples = session.next_samples()
    assert all(s.advantage == 0.0 for s in samples[::4])
    weights = TokenWeights.for_step(samples, session.maker)
    rewarded = [s for s in samples if s.rollout.reward is not None]
    assert weights.policy == 1 / sum(len(s.rollout.response_ids) for s in rewarded)
    assert update(session, samples).metrics()["reward/missing_share"] == 0.25


def test_samples_without_feedback_have_no_teacher(tmp_path):
    whole = session_of(tmp_path, "critique")
    some = session_of(tmp_path, "critique")
    samples = whole.next_samples()
    partly = [
        type(s)(s.rollout, s.student_ids, None, s.advantage) if i % 3 == 0 else s
        for i, s in enumerate(samples)
    ]
    got, statistics = kept_gradients(some, partly)
    want, _ = kept_gradients(whole, [s for s in partly if s.teacher_ids is not None])
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max()
    assert statistics.divergence(0) is None and statistics.divergence(1) >= 0


def test_a_run_leaves_its_folder(tmp_path):
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = run_small(small_config("critique", optim={"steps": 2}), tmp_path / "run")
    AutoModelForCausalLM.from_pretrained(run / "checkpoint-2")
    assert AutoTokenizer.from_pretrained(run / "checkpoint-2").chat_template
    facts = json.loads((run / "run.json").read_text())
    assert facts["implementations"]["loss_head"].split()[0] in ("chunked", "native", "triton")
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {
        "loss", "grad_norm", "lr", "reward/mean", "divergence/mean", "entropy/mean", "length/mean",
        "length/truncated_share", "feedback/cut_share", "feedback/missing_share", "memory/peak_mib",
        *(f"time/{phase}_s" for phase in PHASES),
        *(f"tokens_per_s/{phase}" for phase in PHASES),
        *(f"{what}/{role}" for what in ("tokens", "tokens_saved", "sharing")
          for role in ("student", "teacher")),
    }  # fmt: skip
    assert wanted <= record.keys()
    table = pq.read_table(run / "completions" / "completions_00002.parquet")
    assert {"prompt", "completion", "reward", "advantage", "critique", "divergence"} <= set(
        table.column_names
    )
    assert table.num_rows == 12
    assert not list(run.rglob("*.pt")) + list(run.rglob("*.bin")) + list(run.rglob("*.pkl"))


@pytest.mark.parametrize("condition", ["grpo", "critique"])
def test_lora_trains_only_adapters(condition, tmp_path):
    session = session_of(tmp_path, condition, model={"lora": LORA}, teacher={"kind": "adapter_off"})
    before = copy.deepcopy(session.policy.model.state_dict())
    session.reward = lambda prompts, **columns: [float(i % 2) for i in range(len(prompts))]
    for _ in range(2):
        update(session, session.next_samples())
    after = session.policy.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved and all("lora_" in name for name in moved)


def test_small_preset_is_still_the_embedded_task():
    assert small_config("grpo").data.task == "chain_sum" and SMALL["optim"]["steps"] == 6
