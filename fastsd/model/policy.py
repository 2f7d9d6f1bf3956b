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

from fastsd.model import attention, facts
from fastsd.model.cpu_linear import takes_onednn
from fastsd.model.packing import Pack, PrefixKeys, longest_path, pack_trees
from fastsd.model.refusals import (
    ModelError,
    check_length,
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
        return implementation_name("auto", self.device, self.dtype, facts.head_dim(self.config))

    @property
    def linear_name(self) -> str:
        """What multiplies in the linear layers when training."""
        onednn = self.dtype == torch.float32 and takes_onednn(self.head.weight)
        return "onednn" if onednn else "torch"

    def head_options(self) -> dict:
        """How this model turns head products into logits: keyword arguments of the loss head."""
        return {
            "bias_V": getattr(self.head, "bias", None),
            "logit_scale": facts.logit_scale(self.config),
            "softcap": facts.logit_softcap(self.config),
        }

    def check_length(self, tokens: int) -> None:
        """Raises ModelError when a sequence would leave what the model computes exactly."""
        check_length(self.config, tokens)

    def decode_cache(self, slots: int, max_new_tokens: int) -> PrefixDecodeCache:
        """Keys and values for `slots` responses at once, to be decoded with `decode`."""
        return PrefixDecodeCache(
            self.config.num_hidden_layers,
            facts.kv_heads(self.config),
            facts.head_dim(self.config),
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


def trainable_parameters(model) -> Iterable[tuple[str, torch.nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)
