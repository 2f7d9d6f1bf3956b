"""Advantages of a context by the definition: two full rows per rollout, full logits."""

import pytest
import torch
from runs import small_config

from fastsd.localise import context_advantages
from fastsd.session import Session


def log_probs(session, prompt_ids, response_ids):
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = session.policy.model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    logits = logits.double() / session.config.rollout.temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response_ids)[:, None])[:, 0]


@pytest.mark.parametrize("condition", ["reference", "critique"])
@torch.no_grad()
def test_advantages_come_in_the_rollouts_order(condition, tmp_path):
    found = []
    for budget in (100_000, 250, 30):
        optim = {"micro_batch_tokens": budget}
        session = Session(small_config(condition, optim=optim), tmp_path)
        tokens = []
        session.policy.decoder.layers[0].register_forward_pre_hook(
            lambda _, args, tokens=tokens: tokens.append(args[0].shape[1])
        )
        samples = session.next_samples()
        tokens.clear()
        rollouts = [sample.rollout for sample in samples]
        found.append(context_advantages(session, rollouts, condition))
        if budget == 100_000:
            question = sum({s.group: len(s.student_ids) for s in samples}.values())
            response = sum(len(s.rollout.response_ids) - 1 for s in samples)
            assert tokens[0] == question + response
            # The teacher reads all of the question but its end, which feedback follows.
            assert tokens[1] < response + sum(len(s.teacher_ids) - 5 for s in samples)
    for sample, *values in zip(samples, *found, strict=True):
        ids = sample.rollout.response_ids
        teacher, student = (
            log_probs(session, prompt, ids) for prompt in (sample.teacher_ids, sample.student_ids)
        )
        for got in values:
            # fp32 log-probs of a few units, differences of two.
            torch.testing.assert_close(
                torch.tensor(got).double(), teacher - student, rtol=0, atol=5e-5
            )
