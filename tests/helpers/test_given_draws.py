"""The draws that compared runs are given: a token that rounding turned is replaced, no other."""

import pytest
import torch
from given_draws import EDGE, Draws

from fastsd_kernels import sample_from_logits

B, V = 40_000, 50
WHOLE = {"top_k": 0, "top_p": 1.0}


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the numbers of the draws."""
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(B, V, generator=draw), torch.rand(B, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_at_the_edge_are_given_with_this_runs_log_probs(temperature):
    options = {"temperature": temperature, **WHOLE}
    logits_BV, uniform_B = rows()
    first = Draws()
    token_B, logprob_B = first.draw(logits_BV.clone(), uniform_B, **options)
    assert torch.equal(token_B, sample_from_logits(logits_BV.clone(), uniform_B, **options)[0])
    rounded_BV = logits_BV + 3e-4 * torch.randn(B, V, generator=torch.Generator().manual_seed(1))
    own_B, _ = sample_from_logits(rounded_BV.clone(), uniform_B, **options)
    assert (own_B != token_B).any()
    second = Draws(first.tokens)
    given_B, given_logprob_B = second.draw(rounded_BV.clone(), uniform_B, **options)
    assert torch.equal(given_B, token_B) and second.turned == (own_B != token_B).sum()
    z_BV = (rounded_BV / temperature).log_softmax(-1)
    torch.testing.assert_close(given_logprob_B, z_BV.gather(-1, token_B[:, None])[:, 0])
    assert not torch.equal(given_logprob_B, logprob_B)


def test_a_token_of_another_distribution_is_refused():
    logits_BV, uniform_B = rows()
    first = Draws()
    first.draw(logits_BV.clone(), uniform_B, **WHOLE)
    shifted_BV = logits_BV.clone()
    shifted_BV[:, 0] += 30 * EDGE
    with pytest.raises(AssertionError, match="rounding does not explain"):
        Draws(first.tokens).draw(shifted_BV, uniform_B, **WHOLE)


def test_a_draw_that_the_first_run_did_not_make_is_an_error():
    logits_BV, uniform_B = rows()
    first = Draws()
    first.draw(logits_BV.clone(), uniform_B, **WHOLE)
    with pytest.raises(KeyError):
        Draws(first.tokens).draw(*rows(seed=1), **WHOLE)
