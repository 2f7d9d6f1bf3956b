"""Hugging Face models as policies: token trees in, last hidden states out, never logits.

`hidden` computes a tree's prefix once: the prefix fills a key/value cache, gradient included, and
the branches of all trees then run as one batch against it. With gradient checkpointing, which
cannot keep a cache, every branch runs as a full row instead; that path is also the definition the
shared one is tested against.

Shapes: P prefixes, B branches, L padded prefix length, C padded branch length, T response tokens
of all trees packed in order, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from fastsd import attention
from fastsd.config import LoraConfig, ModelConfig
from fastsd.types import FastsdError, TokenTree


class ModelError(FastsdError):
    """A model that cannot be trained here: unsupported layers, missing files, wrong names."""


class Policy:
    """A causal language model split where fastsd needs it: decoder, head, tokenizer."""

    def __init__(self, model, tokenizer, shares_prefixes: bool = True):
        self.model = model
        self.shares_prefixes = shares_prefixes
        self.tokenizer = tokenizer
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = causal_lm.config
        self.decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        self.head = causal_lm.get_output_embeddings()
        self.pad_id = next(
            i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None
        )

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def head_VD(self) -> Tensor:
        return self.head.weight

    def head_options(self) -> dict:
        """How this model turns head products into logits: keyword arguments of the loss head."""
        scale = getattr(self.config, "logit_scale", None) or 1.0
        scale /= getattr(self.config, "logits_scaling", None) or 1.0
        return {
            "bias_V": getattr(self.head, "bias", None),
            "logit_scale": scale,
            "softcap": getattr(self.config, "final_logit_softcapping", None),
        }

    def check_length(self, tokens: int) -> None:
        """Raises ModelError when a sequence would leave the model's positions."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ModelError(
                f"a sequence of {tokens} tokens (prompt + response) exceeds the model's "
                f"max_position_embeddings = {limit}: lower rollout.max_new_tokens, "
                "prompt.max_prompt_tokens or prompt.max_feedback_tokens"
            )

    def prefill(self, prefix_ids: Sequence[Sequence[int]]):
        """Runs the prefixes, right-padded. Returns (cache, hidden_PLD, length_P)."""
        ids_PL, length_P = _pad(prefix_ids, self.pad_id, self.device)
        cache = DynamicCache(config=self.config)
        out = self.decoder(input_ids=ids_PL, past_key_values=cache, use_cache=True)
        return out.past_key_values, out.last_hidden_state, length_P

    def hidden(self, trees: Sequence[TokenTree]) -> Tensor:
        """hidden_TD: for every response token, in order, the last hidden state that predicts it."""
        for tree in trees:
            longest = max(len(b.context_ids) + len(b.response_ids) for b in tree.branches)
            self.check_length(len(tree.prefix_ids) + longest)
        if self.shares_prefixes or not torch.is_grad_enabled():
            return self.hidden_shared(trees)
        # Hugging Face layers checkpoint, and drop their cache, in training mode only.
        self.model.train()
        try:
            return self.hidden_unshared(trees)
        finally:
            self.model.eval()

    def hidden_shared(self, trees: Sequence[TokenTree]) -> Tensor:
        """`hidden` with each prefix computed once for all its branches."""
        cache, hidden_PLD, length_P = self.prefill([tree.prefix_ids for tree in trees])
        last_PD = hidden_PLD[torch.arange(len(trees)), length_P - 1]
        tree_of_branch = [t for t, tree in enumerate(trees) for _ in tree.branches]
        branches = [branch for tree in trees for branch in tree.branches]
        fed = [(*branch.context_ids, *branch.response_ids[:-1]) for branch in branches]
        ids_BC, length_B = _pad(fed, self.pad_id, self.device)
        rows = [last_PD]
        if ids_BC.shape[1]:
            index_B = torch.tensor(tree_of_branch, device=self.device)
            rows.append(self._branches(cache, ids_BC, length_P[index_B], index_B).flatten(0, 1))
        # Row P + b*C + c holds branch b after its c-th fed token; the prefix's last row precedes.
        row_of_token = []
        for b, (t, branch) in enumerate(zip(tree_of_branch, branches, strict=True)):
            first = len(trees) + b * ids_BC.shape[1] + len(branch.context_ids) - 1
            row_of_token.append(t if not branch.context_ids else first)
            row_of_token += range(first + 1, first + len(branch.response_ids))
        return torch.cat(rows)[torch.tensor(row_of_token, device=self.device)]

    def _branches(self, prefix_cache, ids_BC, prefix_length_B, index_B) -> Tensor:
        layers = [(layer.keys[index_B], layer.values[index_B]) for layer in prefix_cache.layers]
        cache = DynamicCache(ddp_cache_data=layers)
        branch_length = ids_BC.shape[1]
        column_L = torch.arange(layers[0][0].shape[2], device=self.device)
        prefix_mask = (column_L < prefix_length_B[:, None])[:, None, None]
        column_C = torch.arange(branch_length, device=self.device)
        causal_CC = column_C[:, None] >= column_C
        mask = torch.cat(
            [
                prefix_mask.expand(-1, 1, branch_length, -1),
                causal_CC.expand(len(ids_BC), 1, -1, -1),
            ],
            -1,
        )
        return self.decoder(
            input_ids=ids_BC,
            position_ids=prefix_length_B[:, None] + column_C,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def hidden_unshared(self, trees: Sequence[TokenTree]) -> Tensor:
        """`hidden` with every branch as a full row: prefix, context, response."""
        rows = [
            (*tree.prefix_ids, *branch.context_ids, *branch.response_ids[:-1])
            for tree in trees
            for branch in tree.branches
        ]
        ids_BC, length_B = _pad(rows, self.pad_id, self.device)
        hidden_BCD = self.decoder(input_ids=ids_BC, use_cache=False).last_hidden_state
        responses = [len(b.response_ids) for tree in trees for b in tree.branches]
        lengths = length_B.tolist()
        return torch.cat(
            [hidden_BCD[b, lengths[b] - count : lengths[b]] for b, count in enumerate(responses)]
        )

    def copy(self) -> Policy:
        """A copy without gradient. Frozen weights, which never change, are shared, not copied."""
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        model = copy.deepcopy(self.model, shared).requires_grad_(False).eval()
        return Policy(model, self.tokenizer)

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

        LoRA adapters are merged into a copy of the weights here; they are kept apart, exactly, in
        the trainer's own state.
        """
        model = self.model
        if hasattr(model, "merge_and_unload"):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)


def load_policy(config: ModelConfig, device: str, dtype: torch.dtype) -> Policy:
    """Loads model and tokenizer, checks them, adds LoRA, freezes, switches dropout off.

    Raises ModelError naming the folder, layer type or pattern at fault.
    """
    transformers_logging.disable_progress_bar()
    path = model_path(config.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention.NAME
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name = {config.name!r} cannot be loaded: {error}") from error
    refuse_unsupported(model.config)
    model = model.to(device)
    _switch_dropout_off(model)
    if config.lora is not None:
        model = _add_lora(model, config.lora)
    _freeze(model, config.freeze)
    if config.gradient_checkpointing:
        # transformers renamed it in 5.2x and warns about the old name.
        new_name = hasattr(model, "activation_checkpointing_enable")
        enable = "activation_checkpointing_enable" if new_name else "gradient_checkpointing_enable"
        getattr(model, enable)({"use_reentrant": False})
    return Policy(model.eval(), tokenizer, shares_prefixes=not config.gradient_checkpointing)


def model_path(name: str) -> str:
    """The folder or hub name to load: "chain_sum" is the base that ships with the package."""
    if name == "chain_sum":
        from fastsd.tasks.chain_sum import base_path

        return str(base_path())
    return name


def refuse_unsupported(config) -> None:
    """Raises ModelError for attention that fastsd does not compute exactly."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: encoder-decoder models are not supported; use a causal LM")
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other or (getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")):
        kinds = ", ".join(sorted(other)) or "sliding_window"
        raise ModelError(f"{name}: {kinds} layers are not supported; use a full-attention model")
    if getattr(config, "attn_logit_softcapping", None):
        raise ModelError(f"{name}: attention softcapping is not supported")


def trainable_parameters(model) -> Iterable[tuple[str, torch.nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def _pad(sequences, pad_id: int, device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [rows, longest] and lengths."""
    lengths = [len(sequence) for sequence in sequences]
    padded = [list(s) + [pad_id] * (max(lengths) - len(s)) for s in sequences]
    return torch.tensor(padded, device=device).reshape(len(padded), -1).long(), torch.tensor(
        lengths, device=device
    )


def _switch_dropout_off(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


def _add_lora(model, config: LoraConfig):
    try:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
    except ImportError as error:
        raise ModelError("model.lora needs peft: pip install 'fastsd[lora]'") from error
    peft_config = PeftConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(config.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules: {error}") from error


def _freeze(model, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(pattern in name for name in names):
            raise ModelError(
                f"model.freeze: no parameter's name contains {pattern!r}; names look like "
                f"{names[0]!r}"
            )
    for name, parameter in model.named_parameters():
        if any(pattern in name for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("model.freeze leaves nothing to train")
