"""Models whose attention is not computed exactly here are refused by name, with what to do.

At load by configuration (`refuse_unsupported`), before a sequence runs by its length
(`length_limits`), and in the attention function by what a layer asks for (`refuse_layer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastsd.errors import FastsdError
from fastsd.model import facts

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


class ModelError(FastsdError):
    """A model that cannot be trained here: unsupported layers, missing files, wrong names."""


def refuse_unsupported(config) -> None:
    """Raises ModelError for attention that fastsd does not compute exactly."""
    name = config.model_type
    if facts.is_encoder_decoder(config):
        raise ModelError(f"{name}: encoder-decoder models are not supported; use a causal LM")
    kinds = facts.layer_kinds(config)
    other = sorted(set(kinds) - _SUPPORTED_LAYERS)
    if other:
        what = "hybrid models with " if _SUPPORTED_LAYERS & set(kinds) else ""
        raise ModelError(
            f"{name}: {what}{', '.join(other)} layers are not supported; use a model whose layers "
            "are all full attention"
        )
    if facts.attention_softcap(config) is not None:
        raise ModelError(f"{name}: attention softcapping is not supported; use a model without it")
    _refuse_latent_attention(config)
    if facts.is_bidirectional(config):
        raise ModelError(f"{name}: bidirectional attention is not supported; use a causal LM")


def _refuse_latent_attention(config) -> None:
    """Its keys and values have other head dims than the configuration's one."""
    dims = facts.latent_dims(config)
    if dims is not None:
        nope, value = dims
        raise ModelError(
            f"{config.model_type}: multi-head latent attention (qk_nope_head_dim = {nope}, "
            f"v_head_dim = {value}) is not supported; use a model with multi-head or grouped-query "
            "attention"
        )


def refuse_sinks(model) -> None:
    """Raises ModelError naming the parameter of an attention that sums over more than its keys."""
    for name, _ in model.named_parameters():
        if name.rpartition(".")[2] == "sinks":
            raise ModelError(
                f"{model.config.model_type}: attention sinks ({name}) are not supported; use a "
                "model without them"
            )


def refuse_adapted_head(model) -> None:
    """Raises ModelError for an adapter on the head, or on an embedding tied to it: the loss head
    and the sampler multiply by the head's own weight, and would pass it over."""
    head = model.get_base_model().get_output_embeddings()
    for name, module in model.named_modules():
        # Experts, many matrices in one parameter, are wrapped without a weight of their own.
        if hasattr(module, "lora_A") and getattr(module, "weight", None) is head.weight:
            module_name = name.rpartition(".")[2]
            raise ModelError(
                f"model.lora.target_modules: {module_name!r} is the head, or tied to it, which "
                "takes no adapter; leave it out, or train all weights without model.lora"
            )


def length_limits(config) -> Iterator[tuple[str, int, str]]:
    """(setting, tokens, why) for everything that bounds a sequence of this model."""
    positions = facts.max_positions(config)
    if positions is not None:
        yield "max_position_embeddings", positions, "the model has no more positions"
    window = facts.sliding_window(config)
    if window is not None:
        yield "sliding_window", window, "sliding-window attention is not supported"
    short = facts.short_rope(config)
    if short is not None:
        why = "longrope's frequencies depend on the longest row of a batch beyond it"
        yield "original_max_position_embeddings", short, why


def longest_sequence(config) -> int | None:
    """Tokens of the longest sequence that `check_length` lets pass; None: any."""
    return min((limit for _, limit, _ in length_limits(config)), default=None)


def check_length(config, tokens: int) -> None:
    """Raises ModelError when a sequence of `tokens` leaves what the model computes exactly."""
    for setting, limit, why in length_limits(config):
        if tokens > limit:
            raise ModelError(
                f"a sequence of {tokens} tokens (prompt + response) exceeds the model's "
                f"{setting} = {limit} ({why}): lower rollout.max_new_tokens, "
                "prompt.max_prompt_tokens or prompt.max_feedback_tokens"
            )


def refuse_layer(span: int, dropout: float, asked: dict[str, Any]) -> None:
    """Raises ModelError where a layer asks its attention function for what is not computed.

    span: positions from the first key to the last query. asked: the layer's keyword arguments.
    """
    if dropout:
        raise ModelError(
            f"attention dropout {dropout} is not supported: load the model with fastsd.model."
            "load_policy, which switches it off, or set attention_dropout to 0"
        )
    window = asked.get("sliding_window")
    if window is not None and span > window:
        raise ModelError(
            f"sliding-window attention is not supported: {span} positions exceed the layer's "
            f"window of {window}; shorten prompts or responses, or use a full-attention model"
        )
    if asked.get("softcap") is not None:
        raise ModelError("attention softcapping is not supported; use a model without it")
    if asked.get("s_aux") is not None:
        raise ModelError("attention sinks are not supported; use a model without them")
