"""A frozen Hugging Face model in this process that writes the critiques, through our sampler.

The sampler gives it what a solver has: the instruction that all conversations begin with is
prefilled once, replies are decoded side by side, and a reply has the same text however they were
batched. Greedy is top_k = 1. The policy and its critic are two models in memory; the critic keeps
no gradient and no optimizer state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from jinja2 import TemplateError

from fastsd.config.sections import CriticConfig, ModelConfig, PromptConfig, RolloutConfig
from fastsd.model import Policy, load_policy
from fastsd.model.refusals import ModelError, longest_sequence
from fastsd.prompts.render import PromptRenderer
from fastsd.rollout import Sampler
from fastsd.serving.cache import Reply
from fastsd.types import Conversation, Prompt, Rollout

# Memory for replies under way, in tokens: fewer at once where they may be long.
_REPLY_TOKENS = 131_072
_MOST_ROWS = 256
_UNLIMITED = 2**31 - 1
_PROBE = ({"role": "system", "content": "Judge."}, {"role": "user", "content": "This."})


class LocalWriter:
    """`fastsd.critics.writer.Writer` from a model folder or Hugging Face name, critic.model.

    Raises ModelError where the model cannot be loaded, has too few positions for critic.max_tokens
    or takes no system message.
    """

    def __init__(self, config: CriticConfig, device: str, dtype: torch.dtype):
        try:
            self.policy = load_policy(ModelConfig(name=config.model), device, dtype)
        except ModelError as error:
            raise ModelError(f"critic.model = {config.model!r}: {error}") from error
        self.policy.model.requires_grad_(False)
        longest = longest_sequence(self.policy.config)
        if longest is not None and config.max_tokens >= longest:
            raise ModelError(
                f"critic.max_tokens = {config.max_tokens}: {config.model!r} has {longest} "
                "positions for prompt and reply together; lower it"
            )
        self.room = _UNLIMITED if longest is None else longest - config.max_tokens
        prompt = PromptConfig(
            student_template_kwargs=config.template_kwargs, max_prompt_tokens=_UNLIMITED
        )
        self.renderer = PromptRenderer(self.policy.tokenizer, prompt)
        self._check_template(config.model)
        rows = max(1, min(_MOST_ROWS, _REPLY_TOKENS // config.max_tokens))
        rollout = RolloutConfig(max_new_tokens=config.max_tokens, top_k=1, batch_rows=rows)
        self.sampler = Sampler(self.policy, self.renderer, rollout)
        self.name = f"local ({config.model}, {str(dtype).removeprefix('torch.')})"
        self.identity = {
            "kind": "local",
            "model": config.model,
            "weights": _fingerprint(self.policy),
            "template_kwargs": config.template_kwargs,
            "max_tokens": config.max_tokens,
        }

    def write(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """One reply for each conversation, in order; one that leaves no room for critic.max_tokens
        fails by itself as "too_long_prompt"."""
        prompts = [_prompt(index, turns) for index, turns in enumerate(conversations)]
        fits = [len(self.renderer.student(prompt)) <= self.room for prompt in prompts]
        asked = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        written = iter(self.sampler.sample(asked, 1, key=()))
        return [
            self._reply(next(written)) if fit else Reply(None, failure="too_long_prompt")
            for fit in fits
        ]

    def _reply(self, rollout: Rollout) -> Reply:
        """With the special tokens that were written: whoever reads it judges them."""
        ids = rollout.response_ids[: None if rollout.truncated else -1]
        text = self.policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return Reply(text, rollout.truncated)

    def _check_template(self, model: str) -> None:
        try:
            self.renderer.student(_prompt(0, _PROBE))
        except TemplateError as error:
            raise ModelError(
                f"critic.model = {model!r}: its chat template refuses a system message before the "
                f"user's ({error}); choose a model whose template takes one"
            ) from error


def _prompt(index: int, turns: Sequence[Mapping[str, str]]) -> Prompt:
    return Prompt(str(index), tuple(turns))


def _fingerprint(policy: Policy) -> str:
    """Tells models of one name apart: the template, the type and beginning of every weight."""
    digest = hashlib.sha256(str(policy.tokenizer.chat_template).encode())
    for name, weight in policy.model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.reshape(-1)[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
