"""What a Hugging Face model gives its head, and the heads and models that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from fastsd_kernels.adapters.hidden_states import head_weight, hidden_states


def test_hidden_states_are_the_heads_inputs():
    model = LlamaForCausalLM(_small(LlamaConfig)).double()
    ids = torch.randint(3, 20, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = hidden_states(model, ids, mask)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model.lm_head(found), logits) and found.requires_grad
    assert "forward" not in vars(model.lm_head)  # the head is itself again
    model.get_input_embeddings().weight.data[ids[1]] = torch.nan  # a padded or diverged row
    assert hidden_states(model, ids, mask)[1].isnan().all()


class _Subclass(torch.Tensor):
    pass


def _small(config, **more):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20,
             "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
    return config(**sizes, **more)


def test_models_it_cannot_honour_are_refused():
    ids = torch.ones(1, 4, dtype=torch.int64)
    capped = Gemma2ForCausalLM(_small(Gemma2Config, head_dim=8, final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes its logits .*softcap"):
        hidden_states(capped, ids, torch.ones_like(ids))
    biased = PhiForCausalLM(_small(PhiConfig))
    with pytest.raises(ValueError, match="head: expected an nn.Linear without bias"):
        hidden_states(biased, ids, torch.ones_like(ids))
    adapted = LlamaForCausalLM(_small(LlamaConfig))
    adapted = get_peft_model(adapted, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="keep adapters"):
        head_weight(adapted)
    # What ZeRO-3 leaves outside of the forward, and a subclass as DTensor is one.
    for weight in (torch.empty(0), torch.empty(20, 16).as_subclass(_Subclass)):
        sharded = nn.Linear(16, 20, bias=False)
        sharded.weight = nn.Parameter(weight)
        with pytest.raises(ValueError, match="unsharded"):
            head_weight(SimpleNamespace(get_output_embeddings=lambda head=sharded: head))
