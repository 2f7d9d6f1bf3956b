"""A group in parts against the group at once: hidden states, every parameter's gradient, counts."""

import pytest
import torch
from tiny_models import build_tiny, load_tiny
from unpacked import everything_in_fp64

from fastsd.config.sections import LoraConfig, TeacherConfig
from fastsd.errors import FastsdError
from fastsd.model.micro_batches import MicroBatch
from fastsd.runtime.phases import PhaseClock
from fastsd.teachers.passes import DeferredPrefix, Passes
from fastsd.teachers.self_teacher import Teacher
from fastsd.types import Branch, Prompt, Rollout, Sample, TokenTree
from fastsd_kernels import fused_linear_loss

QUESTION = tuple(range(5, 12))
RESPONSES = ((20, 21, 22, 23), (24,), (25, 26), (20, 21, 27))
# Per response another feedback, the same for all, or partly none.
FEEDBACK = {
    "critique": ((40, 41), (40, 42, 43), (40,), (40, 41)),
    "reference": ((40, 41, 42, 43),) * 4,
    "partly": ((40, 41), None, (40, 44), None),
    "grpo": (None,) * 4,
}
PARTS = {"ones": ((0,), (1,), (2,), (3,)), "uneven": ((3,), (0, 1, 2)), "one": ((0, 1, 2, 3),)}
LORA = LoraConfig(r=4, alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
# Above layer 0's keys and values, which then depend on nothing that is trained.
HIGH_LORA = LoraConfig(r=4, alpha=8, target_modules=["down_proj"])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def group(condition, question=QUESTION):
    prompt = Prompt("a", ({"role": "user", "content": "q"},))
    samples = []
    for index, (ids, context) in enumerate(zip(RESPONSES, FEEDBACK[condition], strict=True)):
        rollout = Rollout(prompt, index, ids, (0.0,) * len(ids), "", False)
        teacher = None if context is None else (*question[:-1], *context)
        samples.append(Sample(rollout, question, teacher, 1.0))
    return tuple(samples)


def whole(samples):
    return MicroBatch((samples,))


def in_parts(samples, how):
    parts = tuple(tuple(samples[i] for i in part) for part in PARTS[how])
    return MicroBatch(parts, deferred=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}

    def folder(name):
        if name not in found:
            found[name] = str(build_tiny(name, tmp_path_factory.mktemp(name)))
        return found[name]

    return folder


def teacher_of(policy, kind):
    """A teacher whose weights, unless live, are no longer the student's."""
    teacher = Teacher(policy, TeacherConfig(kind=kind))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.1 * noise.to(parameter.dtype)
    return teacher


def run(policy, batch, teacher=None):
    """Hidden states by sample, gradients by parameter, metrics of the clock."""
    teacher = teacher or Teacher(policy, TeacherConfig(kind="live"))
    clock = PhaseClock(torch.device("cpu"))
    passes = Passes(policy, teacher, batch, clock)
    policy.model.zero_grad()
    states = {}
    for part in batch.parts:
        student_TD = passes.student(part)
        teacher_TD = passes.teacher(part, student_TD)
        loss(policy, part, student_TD, teacher_TD).backward()
        lengths = [len(s.rollout.response_ids) for s in part]
        for s, rows_TD in zip(part, student_TD.detach().split(lengths), strict=True):
            states["student", s.rollout.sample] = rows_TD
        if teacher_TD is not None:
            for s, rows_TD in zip(part, teacher_TD.split(lengths), strict=True):
                if s.teacher_ids is not None:
                    states["teacher", s.rollout.sample] = rows_TD
    passes.finish()
    named = policy.model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return states, gradients, clock.metrics()


def loss(policy, part, student_TD, teacher_TD):
    def per_token(value):
        rows = [[value(s)] * len(s.rollout.response_ids) for s in part]
        return torch.tensor([x for row in rows for x in row])

    options = {}
    if teacher_TD is not None:
        taught_T = per_token(lambda s: float(s.teacher_ids is not None))
        options = {"teacher_TD": teacher_TD, "divergence_weight_T": taught_T}
    return fused_linear_loss(
        student_TD,
        policy.head_VD,
        torch.tensor([i for s in part for i in s.rollout.response_ids]),
        divergence="reverse_kl",
        policy_weight_T=per_token(lambda s: 0.5 + s.rollout.sample),
        impl="reference",
        **options,
    ).loss


def assert_close(got, want, tolerance):
    assert got.keys() == want.keys() and want
    errors = {
        name: float((got[name] - value).norm() / value.norm().clamp_min(1e-30))
        for name, value in want.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e}"


MODELS = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "lora": {"lora": LORA},
    "lora checkpointed": {"lora": LORA, "gradient_checkpointing": True},
    "lora above": {"lora": HIGH_LORA},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3", "gemma3_text", "qwen3_moe"])
def test_parts_equal_the_whole(name, options, dtype, folders, monkeypatch):
    policy = load_tiny(folders(name), dtype, **options)
    if dtype == torch.float64:
        everything_in_fp64(policy, monkeypatch)
    samples = group("critique")
    states, gradients, _ = run(policy, whole(samples))
    for how in PARTS:
        got_states, got, _ = run(policy, in_parts(samples, how))
        assert_close(got_states, states, TOLERANCE[dtype])
        assert_close(got, gradients, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("condition", FEEDBACK)
@pytest.mark.parametrize("kind", ["live", "frozen", "ema", "adapter_off"])
def test_every_teacher_and_condition(kind, condition, dtype, folders, monkeypatch):
    policy = load_tiny(folders("llama"), dtype, lora=LORA if kind == "adapter_off" else None)
    if dtype == torch.float64:
        everything_in_fp64(policy, monkeypatch)
    teacher, samples = teacher_of(policy, kind), group(condition)
    states, gradients, _ = run(policy, whole(samples), teacher)
    got_states, got, _ = run(policy, in_parts(samples, "uneven"), teacher)
    assert_close(got_states, states, TOLERANCE[dtype])
    assert_close(got, gradients, TOLERANCE[dtype])


def test_a_question_of_one_token_has_nothing_to_defer(folders, monkeypatch):
    policy = load_tiny(folders("llama"))
    everything_in_fp64(policy, monkeypatch)
    samples = group("grpo", question=(5,))
    _, gradients, _ = run(policy, whole(samples))
    _, got, metrics = run(policy, in_parts(samples, "ones"))
    assert_close(got, gradients, 1e-10)
    assert metrics["tokens/student"] == 4 + 6


@pytest.mark.parametrize("kind", ["live", "frozen"])
def test_the_prefix_runs_once_and_once_more(kind, folders):
    """Forward passes by their tokens, in order, and the same in the metrics."""
    policy = load_tiny(folders("llama"))
    teacher, tokens = teacher_of(policy, kind), []
    for decoder in {policy.decoder, teacher.policy.decoder}:
        decoder.layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    _, _, metrics = run(policy, in_parts(group("critique"), "uneven"), teacher)
    # The question but for its last token; what the teachers' prompts share but for its last, of
    # which a live teacher reads all but the last token again; sample 3 and its teacher; samples 0
    # to 2 and theirs, whose prompts share one token more; the question with gradient.
    context = 1 if kind == "live" else 6
    assert tokens == [6, context, 1 + 2, 2 + 2, 1 + 4, 1 + 3 + 4, 6]
    assert metrics["tokens/student"] == 6 + 3 + 5 + 6
    assert metrics["tokens/teacher"] == context + 4 + 8
    fed = sum(len(ids) - 1 for ids in RESPONSES)
    assert metrics["tokens/student"] + metrics["tokens_saved/student"] == 4 * 7 + fed
    assert metrics["tokens/teacher"] + metrics["tokens_saved/teacher"] == 8 + 9 + 7 + 8 + fed


def test_the_gradients_of_many_parts_add_up_in_fp32(folders):
    """In bf16 an addend of 1/320 of the sum would be lost; the leaves keep it."""
    policy = load_tiny(folders("llama"), torch.bfloat16)
    prefix = DeferredPrefix(policy, TokenTree(QUESTION[:-1], ()))
    branch = TokenTree(QUESTION, (Branch((), (20, 21)),))
    [key, _] = prefix.keys.layers[0]
    hidden = policy.hidden([branch], prefix.keys)
    hidden.sum().backward()
    once = key.grad.clone()
    for _ in range(319):
        policy.hidden([branch], prefix.keys).sum().backward()
    assert key.grad.dtype == torch.float32
    torch.testing.assert_close(key.grad, 320 * once, rtol=1e-4, atol=0)


def test_bad_rows_are_refused(folders):
    policy = load_tiny(folders("llama"))
    samples = group("critique")
    passes = Passes(
        policy,
        Teacher(policy, TeacherConfig(kind="frozen")),
        whole(samples),
        PhaseClock(torch.device("cpu")),
    )
    student_TD = passes.student(samples)
    with pytest.raises(FastsdError, match="like_TD: expected 10 rows, .* 4 samples, found 9"):
        passes.teacher(samples, student_TD[1:])
    with pytest.raises(ValueError, match="target_T: .*9"):  # the loss head's own check
        loss(policy, samples, student_TD[1:], None)
