"""Every number of a token against the definition: full rows, full logits, fp64."""

from __future__ import annotations

import random

import pytest
import torch
from small_runs import small_config
from tiny_models import build_tiny, load_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.evaluation import statistics as module
from fastsd.evaluation.statistics import token_statistics, top_tokens
from fastsd.types import Prompt, Rollout, Sample

TEMPERATURE = 0.7
BETA = 0.3


def jensen_shannon(s, t):
    m = ((1 - BETA) * s.exp() + BETA * t.exp()).log()
    return (BETA * t.exp() * (t - m) + (1 - BETA) * s.exp() * (s - m)).sum(-1)


DIVERGENCES = {
    "jsd": jensen_shannon,
    "forward_kl": lambda s, t: (t.exp() * (t - s)).sum(-1),
    "reverse_kl": lambda s, t: (s.exp() * (s - t)).sum(-1),
    "sampled_token": lambda s, t: (s.exp() * (s - t)).sum(-1),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = build_tiny("gemma3_text", tmp_path_factory.mktemp("m"), final_logit_softcapping=3.0)
    return load_tiny(folder)


def make_samples(policy, groups=3, size=3) -> list[Sample]:
    rng = random.Random(0)

    def ids(low, high):
        vocabulary = len(policy.head_VD)
        return tuple(rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high)))

    samples = []
    for group in range(groups):
        prompt = Prompt(f"q{group}", ({"role": "user", "content": "?"},))
        question = ids(3, 9)
        for sample in range(size):
            rollout = Rollout(prompt, sample, response := ids(1, 12), (), "", False)
            assert response
            teacher = None if (group, sample) in ((0, 1), (2, 0)) else (*question, *ids(1, 8))
            samples.append(Sample(rollout, question, teacher, 0.0))
    return samples


def log_probs(policy, prompt_ids, response_ids):
    """[T, V] by the definition."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = policy.model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    return (logits.double() / TEMPERATURE).log_softmax(-1)


def settings(divergence="reverse_kl", budget=100_000):
    return small_config(
        "critique",
        rollout={"temperature": TEMPERATURE},
        loss={"divergence": divergence, **({"beta": BETA} if divergence == "jsd" else {})},
        optim={"micro_batch_tokens": budget},
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("budget", [100_000, 60, 20])
@torch.no_grad()
def test_statistics_are_those_of_plain_forwards(divergence, budget, policy):
    samples = make_samples(policy)
    found = token_statistics(policy, settings(divergence, budget), samples, alternatives=3)
    for sample, got in zip(samples, found, strict=True):
        ids = sample.rollout.response_ids
        student = log_probs(policy, sample.student_ids, ids)
        picked = torch.tensor(ids)[:, None]
        close(got.student_logprob, student.gather(-1, picked)[:, 0])
        close(got.entropy, -(student.exp() * student).sum(-1))
        if sample.teacher_ids is None:
            assert got.teacher_logprob == got.divergence == got.alternatives == ()
            continue
        teacher = log_probs(policy, sample.teacher_ids, ids)
        close(got.teacher_logprob, teacher.gather(-1, picked)[:, 0])
        close(got.divergence, DIVERGENCES[divergence](student, teacher))
        values, likeliest = teacher.topk(3)
        close([p for row in got.alternatives for _, p in row], values.flatten())
        names = [policy.tokenizer.decode([i]) for i in likeliest.flatten().tolist()]
        assert [text for row in got.alternatives for text, _ in row] == names


def close(got, expected):
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.float64), (7, torch.float32), (9, torch.bfloat16)]
)
def test_top_tokens_honour_what_the_model_does_to_its_logits(rows, dtype, monkeypatch):
    monkeypatch.setattr(module, "TOP_ROWS", 4)
    monkeypatch.setattr(module, "TOP_COLUMNS", 16)
    torch.manual_seed(0)
    hidden, head, bias = (torch.randn(shape) for shape in ((rows, 8), (37, 8), (37,)))
    hidden, head, bias = hidden.to(dtype), head.to(dtype), bias.to(dtype)
    options = {"temperature": 0.7, "logit_scale": 3.0, "softcap": 5.0, "bias_V": bias}
    values, ids = top_tokens(hidden, head, 4, **options)
    logits = 3.0 * (hidden.double() @ head.double().T + bias.double())
    logits = 5.0 * torch.tanh(logits / 5.0) / 0.7
    expected, likeliest = logits.log_softmax(-1).topk(4)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=tolerance)
    assert ids.tolist() == likeliest.tolist()
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_more_tokens_than_the_vocabulary_has_are_all_of_it():
    values, ids = top_tokens(torch.randn(3, 4), torch.randn(5, 4), 9)
    assert values.shape == ids.shape == (3, 5)
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(3))
    assert top_tokens(torch.randn(3, 4), torch.randn(5, 4), 0)[0].shape == (3, 0)


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(module, "TOP_ROWS", 16)
    hidden, head = torch.randn(200, 4), torch.randn(1000, 4)
    with _Largest() as largest:
        top_tokens(hidden, head, 3)
    assert 16 * 1000 <= largest.numel < 2 * 16 * 1000


def test_alternatives_of_sentencepiece_tokens_keep_their_space():
    class Stripping:
        def decode(self, ids, **options):
            return {0: "a", 1: " b", 2: "c"}[ids[0]]

        def convert_ids_to_tokens(self, token_id):
            return {0: "\u2581a", 1: "\u2581b", 2: "c"}[token_id]

    assert [module._token_text(Stripping(), i) for i in range(3)] == [" a", " b", "c"]
