"""Group advantages against hand-computed values; localisation on responses placed by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastsd.errors import FastsdError
from fastsd.evaluation.localisation import (
    Localisation,
    LocalisationError,
    Region,
    localisation,
    place,
    token_spans,
)
from fastsd.rewards.functions import group_advantages
from fastsd.types import Prompt, Rollout, Step

PROMPT = Prompt("q0", ({"role": "user", "content": "?"},))


def rollout(text: str, tokens: int, reward: float | None = None) -> Rollout:
    return Rollout(PROMPT, 0, tuple(range(tokens)), (0.0,) * tokens, text, False, reward)


def characters(text: str) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(len(text))]


def test_group_advantages_by_hand():
    # rewards 1,0,0,0: mean 1/4, sum of squares 3/4, sample variance 1/4, std 1/2
    expected = [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx(expected, rel=1e-12)


def test_group_advantages_leave_out_what_was_not_scored():
    scored = group_advantages([1.0, 0.0, 0.0])
    assert group_advantages([None, 1.0, 0.0, None, 0.0]) == [0.0, *scored[:2], 0.0, scored[2]]


@pytest.mark.parametrize("rewards", [[1.0] * 8, [0.1] * 3, [None, None], [None, 1.0], [1.0], []])
def test_groups_without_spread_give_exact_zeros(rewards):
    assert group_advantages(rewards) == [0.0] * len(rewards)


def test_group_advantages_match_trl_formula():
    torch = pytest.importorskip("torch")
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert group_advantages(rewards.tolist()) == pytest.approx(expected.tolist(), rel=1e-12)


def test_group_advantages_refuse_nan():
    with pytest.raises(FastsdError, match="finite"):
        group_advantages([math.nan, 1.0])


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {c: i for i, c in enumerate("0123456789abcdef+=;.")} | {"<eos>": 20}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"th": 256, "Ġth": 257, "Ġ=": 258}
    merges = [("t", "h"), ("Ġ", "th"), ("Ġ", "=")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """Strips the leading space when a piece is decoded alone, as Llama 2's does."""
    vocabulary = {"▁a": 0, "▁b": 1, "c": 2, "<0xF0>": 3, "<0x9F>": 4, "<0x98>": 5, "<0x80>": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="c"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_spans_of_a_character_tokenizer_end_with_an_empty_stop_token():
    tokenizer = character_tokenizer()
    ids = [*tokenizer("b+3=e;.")["input_ids"], tokenizer.eos_token_id]
    assert token_spans(tokenizer, ids, "b+3=e;.") == [*characters("b+3=e;."), (7, 7)]


def test_spans_of_a_byte_tokenizer_share_the_bytes_of_a_character():
    tokenizer = byte_tokenizer()
    text = "é th = 😀!"
    ids = tokenizer(text)["input_ids"]
    spans = token_spans(tokenizer, ids, text)
    assert spans == [(0, 1)] * 2 + [(1, 4), (4, 6), (6, 7)] + [(7, 8)] * 4 + [(8, 9)]


def test_spans_of_a_sentencepiece_tokenizer_keep_spaces():
    tokenizer = sentencepiece_like_tokenizer()
    spans = token_spans(tokenizer, [0, 1, 2, 3, 4, 5, 6, 0], "a bc😀 a")
    assert spans == [(0, 1), (1, 3), (3, 4), (4, 5), (4, 5), (4, 5), (4, 5), (5, 7)]


def test_special_tokens_inside_get_an_empty_span_where_they_stand():
    tokenizer = character_tokenizer()
    a, eos = tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id
    spans = token_spans(tokenizer, [eos, a, eos, eos, a, eos], "aa")
    assert spans == [(0, 0), (0, 1), (1, 1), (1, 1), (1, 2), (2, 2)]
    assert token_spans(tokenizer, [eos], "") == [(0, 0)]
    assert token_spans(tokenizer, [], "") == []


def test_a_response_cut_inside_a_character_still_has_spans():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a😀")["input_ids"][:3]
    text = tokenizer.decode(ids)
    spans = token_spans(tokenizer, ids, text)
    assert spans[0] == (0, 1) and spans[1:] == [(1, len(text))] * 2


@given(st.text(max_size=40))
def test_byte_spans_cover_any_text_in_order(text):
    tokenizer = TOKENIZER
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    spans = token_spans(tokenizer, ids, text)
    covered = sorted({c for start, end in spans for c in range(start, end)})
    assert covered == list(range(len(text)))
    assert spans == sorted(spans)


TOKENIZER = byte_tokenizer()


def test_spans_refuse_another_text():
    with pytest.raises(LocalisationError, match="'aa'"):
        token_spans(character_tokenizer(), [10], "aa")


def test_place_of_tokens_that_straddle_and_of_empty_ones():
    wrong = Step(4, 8, False)
    spans = [(0, 4), (3, 5), (4, 4), (5, 6), (7, 9), (8, 9), (8, 8), (3, 3)]
    found = [place(span, wrong) for span in spans]
    assert found == ["before", "at", "at", "at", "at", "after", "after", "before"]


TEXT = "aabbcc."
STEPS = [Step(0, 2, True), Step(2, 4, False), Step(4, 6, False)]


def test_localisation_by_hand():
    values = [0.5, -0.5, -3.0, 1.0, 0.0, -0.25, 0.25]
    found = localisation([rollout(TEXT, 7, 0.0)], [values], [STEPS], [characters(TEXT)])
    assert found.before == Region(2, 1.0, 0.5, 1)
    assert found.at == Region(2, 4.0, 3.0, 1)
    assert found.after == Region(3, 0.5, 0.25, 1)
    record = found.to_json()
    assert record["mean_abs"] == {
        "before": 0.5,
        "at": 2.0,
        "after": pytest.approx(1 / 6),
        "correct": None,
        "peak": 3.0,
    }
    assert record["share_abs"]["at"] == pytest.approx(4 / 5.5)
    assert record["share_negative"]["at"] == pytest.approx(3 / 3.75)
    assert record["negative_share_correct"] is None


def test_fully_correct_and_unplaced_responses_are_told_apart():
    good = [Step(0, 2, True), Step(2, 4, True)]
    values = [-1.0, 1.0, 1.0, 1.0]
    rollouts = [rollout("aabb", 4, reward) for reward in (1.0, None, 0.0, 0.0)]
    steps = [good, good, good, []]
    found = localisation(rollouts, [values] * 4, steps, [characters("aabb")] * 4)
    assert (found.correct_responses, found.unplaced, found.wrong_responses) == (2, 2, 0)
    assert found.negative_share_correct == 0.25
    assert found.share("at") is None


def test_localisations_add_up_and_survive_json():
    values = [[0.5, -0.5, -3.0, 1.0, 0.0, -0.25, 0.25], [1.0] * 7]
    pair, spans = [rollout(TEXT, 7, 0.0)] * 2, [characters(TEXT)] * 2
    both = localisation(pair, values, [STEPS] * 2, spans)
    apart = [localisation(pair[:1], [v], [STEPS], spans[:1]) for v in values]
    assert apart[0] + apart[1] == both
    assert Localisation.from_json(both.to_json()) == both


def test_localisation_names_the_rollout_that_does_not_fit():
    spans = [characters(TEXT)]
    with pytest.raises(LocalisationError, match="rollout 0 has 7 tokens, 6 advantages"):
        localisation([rollout(TEXT, 7)], [[0.0] * 6], [STEPS], spans)
    with pytest.raises(LocalisationError, match="not finite"):
        localisation([rollout(TEXT, 7)], [[math.inf] * 7], [STEPS], spans)
    with pytest.raises(LocalisationError, match="one entry per rollout"):
        localisation([rollout(TEXT, 7)], [], [STEPS], spans)


def test_a_plain_stop_token_that_the_text_leaves_out_has_an_empty_span():
    tokenizer = character_tokenizer()
    ids = tokenizer("ab.")["input_ids"]
    assert token_spans(tokenizer, ids, "ab") == [(0, 1), (1, 2), (2, 2)]
    with pytest.raises(LocalisationError):
        token_spans(tokenizer, ids, "a")
