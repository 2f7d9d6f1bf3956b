"""The step bench's model: random weights and a tokenizer with one token a word, in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from bench.train_step.problem import (
    EOS_ID,
    PAD_ID,
    ROWS,
    SPECIAL,
    Configuration,
    feedback,
    question,
)

# A prompt is what its message says.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_model(folder: Path, configuration: Configuration) -> Path:
    """Writes a Hugging Face folder: random fp32 weights, tokenizer, and train.jsonl (id, problem,
    solution). Logits have some spread, so that the teacher's differ from the student's."""
    c = configuration
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocabulary, hidden_size=c.hidden, intermediate_size=c.ffn,
            num_hidden_layers=c.layers, num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads, max_position_embeddings=8192,
            tie_word_embeddings=True, initializer_range=c.hidden**-0.5,
            pad_token_id=PAD_ID, eos_token_id=EOS_ID, bos_token_id=None,
        ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer(c.vocabulary).save_pretrained(folder)
    rows = (
        {
            "id": str(index),
            "problem": question(c.vocabulary, index, c.lengths.question),
            "solution": feedback(c.vocabulary, index, c.lengths.feedback),
        }
        for index in range(ROWS)
    )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, `vocabulary` of them."""
    words = {word: i for i, word in enumerate(SPECIAL)}
    words |= {f"w{i}": i for i in range(len(SPECIAL), vocabulary)}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.WordPiece(prefix="##")  # joins words with spaces
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
