"""Random models of under 30 thousand parameters, built offline in well under a second.

They are real Hugging Face folders (config, safetensors, tokenizer.json, chat template, generation
config), so whatever loads a user's model loads them too. Both tokenizers are byte-level BPE with
single digits: any text round-trips, and `<|im_start|>` / `<|im_end|>` are special tokens that a
test can try to smuggle into untrusted text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from places import DATA
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastsd.config.sections import ModelConfig
from fastsd.model import Policy, load_policy

QWEN3_TEMPLATE = DATA / "qwen3_tiny" / "chat_template.jinja"

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Enough text for a few dozen merges; the 256 bytes are in the vocabulary anyway.
_CORPUS = (
    "system user assistant question answer hint solution step the number of apples and marbles",
    "Tom has 12 apples. He finds 7, then buys 25. How many apples does Tom have now?",
    "Here is a worked solution to this problem: Now solve the problem. Answer: 44",
)

_CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN3_SPECIAL = (*_CHATML_SPECIAL, "<|object_ref_start|>", "<|object_ref_end|>", "<|fim_prefix|>")
# Qwen3 adds these as whole tokens without making them special, so that decoding keeps them.
_QWEN3_TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


def build_tiny_llama(folder: str | Path, *, seed: int = 0, vocab_size: int = 300) -> Path:
    """Write a random 2-layer Llama (hidden 32, tied embeddings) with a ChatML template.

    `<|im_end|>` ends a turn, `<|endoftext|>` pads. Returns the folder.
    """
    tokenizer = _tokenizer(vocab_size, _CHATML_SPECIAL, (), CHATML_TEMPLATE)
    config = LlamaConfig(max_position_embeddings=2048, **_shape(tokenizer))
    return _save(Path(folder), _random(LlamaForCausalLM, config, seed), tokenizer)


def build_tiny_qwen3(folder: str | Path, *, seed: int = 0, vocab_size: int = 320) -> Path:
    """Write a random 2-layer Qwen3 with the real Qwen3 chat template (`enable_thinking` works).

    Returns the folder.
    """
    template = QWEN3_TEMPLATE.read_text(encoding="utf-8")
    tokenizer = _tokenizer(vocab_size, _QWEN3_SPECIAL, _QWEN3_TAGS, template)
    config = Qwen3Config(head_dim=8, max_position_embeddings=40960, **_shape(tokenizer))
    return _save(Path(folder), _random(Qwen3ForCausalLM, config, seed), tokenizer)


# What makes each architecture's attention its own, in two layers; windows longer than any test's
# rows, one SmolLM3 layer without rotary positions, every Qwen3-MoE layer sparse.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    "mistral": {"head_dim": 8, "sliding_window": 64},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}


def build_tiny(architecture: str, folder: str | Path, *, seed: int = 0, **settings) -> Path:
    """Write a random 2-layer model of any Hugging Face decoder, by its model_type.

    settings override the configuration. All parameters, norms and biases too, are far from their
    initial values, so that attention is far from uniform. Returns the folder.
    """
    tokenizer = _tokenizer(300, _CHATML_SPECIAL, (), CHATML_TEMPLATE)
    shape = {**_shape(tokenizer), "max_position_embeddings": 2048}
    special = ARCHITECTURES.get(architecture, {})
    config = AutoConfig.for_model(architecture, **{**shape, **special, **settings})
    model = _random(AutoModelForCausalLM.from_config, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return _save(Path(folder), model, tokenizer)


def load_tiny(folder: str | Path, dtype: torch.dtype = torch.float64, **options) -> Policy:
    """The model as a policy in any dtype; options are those of ModelConfig."""
    torch.manual_seed(0)
    policy = load_policy(ModelConfig(name=str(folder), **options), "cpu", torch.float32)
    policy.model.to(dtype)
    with torch.no_grad():  # B starts at zero, which would hide a wrong A
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return policy


def _tokenizer(
    vocab_size: int, special: tuple[str, ...], tags: tuple[str, ...], template: str
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in special if token != "<|endoftext|>"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return wrapped


def _shape(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _random(kind: Callable[..., PreTrainedModel], config, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
