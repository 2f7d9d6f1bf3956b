"""A model in numbers, from its configuration alone: no weights are read or made.

D hidden.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from fastsd.config.sections import ModelConfig
from fastsd.model import attention, facts
from fastsd.model.loading import model_path, prepare_training
from fastsd.model.refusals import ModelError, longest_sequence, refuse_unsupported
from fastsd.planning.trace import Pass, Product, trace


@dataclass(frozen=True)
class ModelCounts:
    """A model in numbers.

    parameters, trainable: how many weights. rounded: trainable ones in a low precision, which have
    fp32 masters. weight_bytes, gradient_bytes: in their own types, which for adapters is fp32.
    root: weights in no layer (embedding, norm, own head), root_trainable of them. largest_layer: of
    one layer. tied: the head is the embedding. longest: positions that the model has. width: bytes
    of a compute element. checkpoints: layers run again in the backward pass. kept: bytes a token
    that autograd keeps for it; kept_layer: of one layer without checkpointing, which is what a
    checkpointed layer needs while it runs again.
    """

    name: str
    parameters: int
    trainable: int
    rounded: int
    weight_bytes: int
    gradient_bytes: int
    root: int
    root_trainable: int
    largest_layer: int
    tied: bool
    head_trainable: bool
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    longest: int | None
    width: int
    checkpoints: bool
    forward: Pass
    backward: Pass
    kept: float
    kept_layer: float

    @property
    def frozen_bytes(self) -> int:
        """Of the weights that are not trained, in their own types."""
        return self.weight_bytes - self.gradient_bytes

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head(self) -> Product:
        """Hidden states against the vocabulary."""
        return Product(self.vocabulary, self.hidden, 1, self.width)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one position in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.width


def count_model(config: ModelConfig, dtype: torch.dtype) -> ModelCounts:
    """Counts of the configured model, as it is trained; reads its configuration, no weights.

    Raises ModelError where there is no configuration to read or its layers are not supported.
    """
    hf_config = read_config(config.name)
    model = _build(hf_config, config, dtype)
    forward, backward, kept = trace(_causal_lm(model), model)
    kept_whole = kept
    if config.gradient_checkpointing:
        without = config.model_copy(update={"gradient_checkpointing": False})
        plain = _build(hf_config, without, dtype)
        kept_whole = trace(_causal_lm(plain), plain)[2]
    root, root_trainable, largest_layer = _parts(model)
    causal_lm = _causal_lm(model)
    head_VD = causal_lm.get_output_embeddings().weight
    trainable = [p for p in model.parameters() if p.requires_grad]
    return ModelCounts(
        name=config.name,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trainable),
        rounded=sum(p.numel() for p in trainable if p.element_size() < 4),
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        gradient_bytes=sum(p.nbytes for p in trainable),
        root=root,
        root_trainable=root_trainable,
        largest_layer=largest_layer,
        tied=head_VD is causal_lm.get_input_embeddings().weight,
        head_trainable=head_VD.requires_grad,
        layers=hf_config.num_hidden_layers,
        hidden=hf_config.hidden_size,
        vocabulary=head_VD.shape[0],
        heads=hf_config.num_attention_heads,
        kv_heads=facts.kv_heads(hf_config),
        head_dim=facts.head_dim(hf_config),
        longest=longest_sequence(hf_config),
        width=dtype.itemsize,
        checkpoints=config.gradient_checkpointing,
        forward=forward,
        backward=backward,
        kept=kept,
        kept_layer=kept_whole / hf_config.num_hidden_layers,
    )


def read_config(name: str) -> Any:
    """The Hugging Face configuration of a model name or folder; raises ModelError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path(name))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.name = {name!r}: its configuration cannot be read: {reason}; give a folder "
            "that holds a config.json, or a Hugging Face name that this machine can reach"
        ) from error
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [field for field in needed if not isinstance(getattr(config, field, None), int)]
    if missing:
        raise ModelError(
            f"model.name = {name!r}: its configuration has no {', '.join(missing)}; a plan needs a "
            "decoder-only language model"
        )
    refuse_unsupported(config)
    return config


def _build(hf_config: Any, config: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
    """The model without memory, as `load_policy` makes it: adapters, frozen parts, checkpoints."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation=attention.NAME
            )
    except (ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model.name = {config.name!r}: no causal LM: {reason}") from error
    with warnings.catch_warnings():
        # peft reads a name of transformers' that changed.
        warnings.simplefilter("ignore", FutureWarning)
        return prepare_training(model, config)


def _parts(model: torch.nn.Module) -> tuple[int, int, int]:
    """Parameters outside the layers, those of them that train, and of the largest layer."""
    layers: Counter[str] = Counter()
    root = trainable = 0
    for name, parameter in model.named_parameters():
        found = re.search(r"\.layers\.(\d+)\.|\.h\.(\d+)\.", name)
        if found:
            layers[found[0]] += parameter.numel()
        else:
            root += parameter.numel()
            trainable += parameter.numel() * parameter.requires_grad
    return root, trainable, max(layers.values(), default=0)


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
