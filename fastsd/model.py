"""Hugging Face models as policies: token trees in, last hidden states out, never logits.

`hidden` packs all trees into one sequence without padding; attention follows the trees
(`attention.TreeAttention`), so a prefix is computed once however many branches it has, with
gradient checkpointing too. `decode` feeds the sampler's rows one token each.

Shapes: T tokens of a pack, A response tokens of all trees in order, B rows being decoded, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fastsd import attention
from fastsd.config.sections import LoraConfig, ModelConfig
from fastsd.cpu_linear import takes_onednn, use_onednn
from fastsd.packing import Pack, PrefixKeys, longest_path, pack_trees
from fastsd.refusals import (
    ModelError,
    check_length,
    refuse_adapted_head,
    refuse_sinks,
    refuse_unsupported,
)
from fastsd.types import Branch, TokenTree
from fastsd_kernels import PrefixDecodeCache
from fastsd_kernels.prefix_attention import implementation_name


class Policy:
    """A causal language model split where fastsd needs it: decoder, head, tokenizer."""

    def __init__(self, model, tokenizer, checkpoints: bool = False):
        self.model = model
        self.checkpoints = checkpoints
        self.tokenizer = tokenizer
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = causal_lm.config
        self.decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        self.head = causal_lm.get_output_embeddings()
        # Where the weights are spread over ranks: what gathers them around `hidden_rows`, and the
        # type that they are gathered in.
        self.gathering: Callable[..., Tensor] | None = None
        self.gathered_dtype: torch.dtype | None = None
        self.pad_id = next(
            i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None
        )

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def head_VD(self) -> Tensor:
        return self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in; its master weights may be kept in another."""
        return self.gathered_dtype or self.head.weight.dtype

    @property
    def attention_name(self) -> str:
        """The implementation of shared-prefix attention that runs for this model."""
        return implementation_name("auto", self.device, self.dtype, self._head_dim)

    @property
    def linear_name(self) -> str:
        """What multiplies in the linear layers when training."""
        onednn = self.dtype == torch.float32 and takes_onednn(self.head.weight)
        return "onednn" if onednn else "torch"

    @property
    def _head_dim(self) -> int:
        head_dim = getattr(self.config, "head_dim", None)
        return head_dim or self.config.hidden_size // self.config.num_attention_heads

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
        """Raises ModelError when a sequence would leave what the model computes exactly."""
        check_length(self.config, tokens)

    def decode_cache(self, slots: int, max_new_tokens: int) -> PrefixDecodeCache:
        """Keys and values for `slots` responses at once, to be decoded with `decode`."""
        config = self.config
        return PrefixDecodeCache(
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            self._head_dim,
            slots,
            max_new_tokens,
            self.dtype,
            self.device,
        )

    def decode(
        self, ids_1B: Tensor, position_1B: Tensor, cache: PrefixDecodeCache, span: int
    ) -> Tensor:
        """hidden_BD after one more token of every row; `cache.begin` has named the rows.

        span: positions of the longest row, the new one included.
        """
        return self.decoder(
            input_ids=ids_1B,
            position_ids=position_1B,
            decode_step=attention.DecodeStep(cache, span),
            use_cache=False,
        ).last_hidden_state[0]

    def hidden(
        self,
        trees: Sequence[TokenTree],
        reads: PrefixKeys | None = None,
        fills: PrefixKeys | None = None,
    ) -> Tensor:
        """hidden_AD: for every response token, in order, the last hidden state that predicts it.

        reads: prefixes that went through the same weights; they are not computed again. fills:
        empty, is given the keys and values of these trees' prefixes.

        Raises ModelError for a tree too long for the model, or layers that attend elsewhere;
        FastsdError for reads of another model or not filled, and for fills that are not empty.
        """
        self.check_length(longest_path(trees))
        if reads is not None:
            reads.check_filled(self.config.num_hidden_layers)
        if fills is not None:
            fills.check_empty()
        pack = pack_trees(trees, reads)
        if fills is not None:
            fills.prefixes += [tree.prefix_ids for tree in trees]
        return self.run(pack, reads, fills)

    def run(
        self, pack: Pack, reads: PrefixKeys | None = None, fills: PrefixKeys | None = None
    ) -> Tensor:
        """hidden_AD: the last hidden states of the pack's row_A. `hidden` says what reads and fills
        are; raises ModelError for layers that attend elsewhere."""
        tree_attention = attention.TreeAttention(pack, reads, fills, self.device)
        # Hugging Face's layers checkpoint in training mode only.
        self.model.train(self.checkpoints and torch.is_grad_enabled())
        try:
            hidden_AD = (self.gathering or self.hidden_rows)(
                pack.row_A.to(self.device),
                input_ids=pack.ids_T[None].to(self.device),
                position_ids=pack.segments.position_of_T[None].to(self.device),
                token_tree=tree_attention,
                use_cache=False,
            )
        finally:
            self.model.eval()
        self._check_layers(tree_attention)
        return hidden_AD

    def hidden_rows(self, row_A: Tensor, **inputs: Any) -> Tensor:
        """The decoder's last hidden states at some rows of its only sequence."""
        return self.decoder(**inputs).last_hidden_state[0].index_select(0, row_A)

    def _check_layers(self, tree_attention: attention.TreeAttention) -> None:
        layers, reached = self.config.num_hidden_layers, len(tree_attention.layers)
        if reached != layers:
            raise ModelError(
                f"{self.config.model_type}: {reached} of {layers} layers compute attention through "
                "transformers' attention interface; linear attention, hybrid and older models are "
                "not supported, use a model whose layers are all full attention"
            )

    def copy(self) -> Policy:
        """A copy without gradient. Frozen weights, which never change, are shared, not copied."""
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        model = copy.deepcopy(self.model, shared).requires_grad_(False).eval()
        return Policy(model, self.tokenizer)

    def try_out(self) -> None:
        """Runs the smallest tree, so that a model that cannot is refused before any work.

        Raises ModelError with what the model said.
        """
        token = self.pad_id
        tree = TokenTree((token,), (Branch((), (token, token)), Branch((token,), (token,))))
        try:
            with torch.no_grad():
                self.hidden([tree])
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.config.model_type}: token trees cannot be run: {error}; use a decoder "
                "whose layers are all full attention"
            ) from error

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
    refuse_sinks(model)
    model = model.to(device)
    _switch_dropout_off(model)
    model = prepare_training(model, config)
    use_onednn(model)
    policy = Policy(model.eval(), tokenizer, checkpoints=config.gradient_checkpointing)
    policy.try_out()
    return policy


def prepare_training(model: Any, config: ModelConfig) -> Any:
    """A Hugging Face causal LM as it is trained: adapters added, parts frozen, checkpoints on.

    Raises ModelError for patterns that match nothing, or leave nothing to train.
    """
    if config.lora is not None:
        model = _add_lora(model, config.lora)
    _freeze(model, config.freeze)
    if config.gradient_checkpointing:
        # transformers renamed it in 5.2x and warns about the old name.
        new_name = hasattr(model, "activation_checkpointing_enable")
        enable = "activation_checkpointing_enable" if new_name else "gradient_checkpointing_enable"
        getattr(model, enable)({"use_reentrant": False})
    return model


def model_path(name: str) -> str:
    """The folder or hub name to load: "chain_sum" is the base that ships with the package."""
    if name == "chain_sum":
        from fastsd.tasks.chain_sum import base_path

        return str(base_path())
    return name


def trainable_parameters(model) -> Iterable[tuple[str, torch.nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def _switch_dropout_off(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):  # for functional dropout
                setattr(module, name, 0.0)


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
        adapted = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules: {error}") from error
    refuse_adapted_head(adapted)
    return adapted


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
