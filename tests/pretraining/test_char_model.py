"""The embedded model's tokenizer and chat template."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastsd.pretraining.char_model import ALPHABET, SPECIALS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As a trainer sees it: saved and loaded again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def rendered_ids(tokenizer, messages) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def test_vocabulary(tokenizer):
    assert len(tokenizer) == 25
    assert tokenizer.all_special_ids == [tokenizer.eos_token_id, tokenizer.pad_token_id, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    # A character that the alphabet lacks must not become a special token.
    assert tokenizer.unk_token is None


def test_round_trip(tokenizer):
    ids = tokenizer.encode(ALPHABET)
    assert ids == list(range(4, 25))
    assert tokenizer.decode(ids) == ALPHABET
    ids = tokenizer.encode("b3d2;<eos>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "b3d2;"
    assert tokenizer.decode(ids) == "b3d2;<eos>"


def test_chat_template(tokenizer):
    # <pad> <eos> <q> <a> are 0 to 3, digits start at 4, then + = ; H ?
    user = {"role": "user", "content": "b3d2"}
    question = [2, 15, 7, 17, 6, 3]
    assert rendered_ids(tokenizer, [user]) == question
    assert rendered_ids(tokenizer, [{"role": "system", "content": "Add."}, user]) == question
    taught = {"role": "user", "content": "b3d2Hb+3=e;"}
    assert rendered_ids(tokenizer, [taught]) == [2, 15, 7, 17, 6, 23, 15, 20, 7, 21, 18, 22, 3]
    answered = [user, {"role": "assistant", "content": "b+3=e;"}]
    assert rendered_ids(tokenizer, answered) == [*question, 15, 20, 7, 21, 18, 22, 1]
    # The rendered conversation starts with the rendered prompt, so responses can be spliced.
    assert tokenizer.apply_chat_template([user], tokenize=False) == "<q>b3d2<a>"


@given(st.lists(st.one_of(st.sampled_from(SPECIALS), st.text(max_size=5))).map("".join))
@settings(max_examples=300, deadline=None)
def test_text_never_becomes_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not set(ids) & set(tokenizer.all_special_ids)
    # One token per character; unknown ones read as the ordinary "?".
    assert tokenizer.decode(ids) == "".join(c if c in ALPHABET else "?" for c in text)
