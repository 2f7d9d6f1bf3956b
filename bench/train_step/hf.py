"""Hugging Face's `generate` as a contestant of the rollout bench.

Attention is sdpa, the cache on; its questions come G times over, as TRL passes them. "static" is
the preallocated cache, without compilation as in TRL; "prefilled" runs each question once and
repeats its cache, which no trainer does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from bench.train_step.count import DTYPES
from bench.train_step.problem import EOS_ID, PAD_ID, Configuration, question
from bench.train_step.worker import Channel, Memory, Meter, serve


def run(settings: dict[str, Any], channel: Channel) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    contestant = Contestant(settings)
    channel.send({"rest_bytes": contestant.memory.rest})
    serve(contestant.answer, channel)


class Contestant:
    """settings: folder, configuration, precision, cache (None, "static" or "prefilled")."""

    def __init__(self, settings: dict[str, Any]):
        folder = Path(settings["folder"])
        self.configuration = Configuration.from_json(settings["configuration"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[settings["precision"]], attn_implementation="sdpa"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.cache = settings["cache"]
        self.meter, self.memory = Meter(), Memory()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """do: generate."""
        return {"generate": self.generate}[request.pop("do")](**request)

    @torch.no_grad()
    def generate(self, index: int, questions: int, tokens: int) -> dict[str, Any]:
        """The configuration's responses to each of `questions` questions of `tokens` tokens."""
        at = self.configuration.lengths
        torch.manual_seed(index)
        self.memory.start()
        self.meter.start()
        vocabulary = self.configuration.vocabulary
        texts = [question(vocabulary, index + i, tokens) for i in range(questions)]
        ids = self.tokenizer(texts, return_tensors="pt")["input_ids"]
        options: dict[str, Any] = {}
        if self.cache == "static":
            options["cache_implementation"] = "static"
        elif self.cache == "prefilled":
            options["past_key_values"] = self._prefilled(ids, at.samples)
        ids = ids.repeat_interleave(at.samples, 0)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=at.response, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, pad_token_id=PAD_ID, eos_token_id=EOS_ID,
            suppress_tokens=[PAD_ID, EOS_ID], disable_compile=True, **options,
        )  # fmt: skip
        found = self.meter.read() | self.memory.read()
        length = out.shape[1] - ids.shape[1]
        return found | {"responses": [length] * len(out)}

    def _prefilled(self, ids: torch.Tensor, samples: int) -> DynamicCache:
        """The cache of all tokens but the last, once for each response."""
        cache = DynamicCache(config=self.model.config)
        self.model.get_decoder()(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(samples)
        return cache
