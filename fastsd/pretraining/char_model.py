"""The embedded model: a character-level tokenizer with a chat template, and a 0.24 M Llama.

Every character of user text is an ordinary token. The special tokens are spelled with several
characters and untrusted text is encoded with `split_special_tokens=True`, so text can never become
a special token; characters outside the alphabet become `?`, which is ordinary too (that is why the
tokenizer declares no `unk_token`).
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = "0123456789abcdef+=;H?"
UNKNOWN = "?"
PAD, EOS, QUESTION, ANSWER = SPECIALS = ("<pad>", "<eos>", "<q>", "<a>")

# A system message has no place in the task and is left out.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<q>' + message['content'] + '<a>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + '<eos>' }}"
    "{%- endif -%}{%- endfor -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `<q>question<a>response<eos>` as the chat template."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *ALPHABET])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[QUESTION, ANSWER],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A freshly initialised float32 Llama: width 96, 2 layers, 4 heads, tied embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=96,
                intermediate_size=288,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=256,
                # Near 1 / sqrt(width). With the usual 0.02, made for wide models, three of four
                # trainings did not learn which of the two operands was still to be written.
                initializer_range=0.08,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=SPECIALS.index(EOS),
                pad_token_id=SPECIALS.index(PAD),
            )
        )
    model.generation_config.do_sample = True
    return model
