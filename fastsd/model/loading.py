"""From a name or folder to a policy: loaded, checked, with adapters, frozen, without dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fastsd.config.sections import LoraConfig, ModelConfig
from fastsd.model import attention
from fastsd.model.cpu_linear import use_onednn
from fastsd.model.policy import Policy
from fastsd.model.refusals import (
    ModelError,
    refuse_adapted_head,
    refuse_sinks,
    refuse_unsupported,
)


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
