"""What a Hugging Face configuration says of a model, read in one place.

Families leave fields out, or set them to None, where they mean the usual; here each has one answer.
"""

from __future__ import annotations

from typing import Any


def head_dim(config: Any) -> int:
    """Numbers in one head's query, key or value."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def kv_heads(config: Any) -> int:
    """Heads of keys and values; as many as of queries where the configuration has none."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def logit_scale(config: Any) -> float:
    """What head products are multiplied by: Cohere's factor, or one over Granite's divisor."""
    scale = getattr(config, "logit_scale", None) or 1.0
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


def logit_softcap(config: Any) -> float | None:
    """c of logits c tanh(z / c); None: they are not capped."""
    return getattr(config, "final_logit_softcapping", None)


def attention_softcap(config: Any) -> float | None:
    """The same for attention scores."""
    return getattr(config, "attn_logit_softcapping", None) or None


def layer_kinds(config: Any) -> list[str]:
    """Each layer's kind where the configuration names them ("full_attention", ...), else []."""
    kinds = [*(getattr(config, "layer_types", None) or ())]
    return [*kinds, *(getattr(config, "layers_block_type", None) or ())]


def latent_dims(config: Any) -> tuple[int, int] | None:
    """(qk_nope_head_dim, v_head_dim) of multi-head latent attention; None: it is another."""
    nope, value = (getattr(config, f"{part}_head_dim", None) for part in ("qk_nope", "v"))
    return (nope, value) if nope and value else None


def is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def is_bidirectional(config: Any) -> bool:
    return bool(getattr(config, "use_bidirectional_attention", None))


def sliding_window(config: Any) -> int | None:
    """The window of the model's sliding layers; None where there are none."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def max_positions(config: Any) -> int | None:
    """Positions that the model has; None: any number."""
    return getattr(config, "max_position_embeddings", None)


def short_rope(config: Any) -> int | None:
    """Tokens up to which longrope's frequencies are the short ones; None: they are not longrope."""
    rope = getattr(config, "rope_parameters", None) or {}
    is_long = rope.get("rope_type") == "longrope"
    return rope.get("original_max_position_embeddings") if is_long else None
