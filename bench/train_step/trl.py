"""TRL's side of the step bench: its SDPO trainer as it is, held before each step until asked.

The templates put question and feedback together without words of their own, so its rows are ours,
token for token. Settings that could make it faster are options of a contestant:

    precision   fp32; autocast: fp32 weights, `bf16=True`; bf16: weights and optimizer in bf16,
                whose rounding swallows steps of this learning rate: for information
    objective   full_logits is ours; topk_logits and sampled_token are cheaper, for information
    micro       micro-batches of a step: less memory at once
    cache       "static": a preallocated cache for `generate`, without compilation
    checkpointing   of layers: less memory, one more forward
Dropout, logging and saving are off; attention is sdpa; AdamW is fused.

Phases: student and teacher are the decoder's forward with and without gradient, head the rest of
`compute_loss` with the language-model head, rollout all that prepares the batch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from bench.train_step.problem import (
    EOS_ID,
    LEARNING_RATE,
    PAD_ID,
    ROWS,
    Configuration,
    digest,
    feedback,
    half_right,
    question,
    responses,
)
from bench.train_step.worker import Channel, Memory, Meter

DTYPES = {"fp32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}
TOP_K = 100


def run(settings: dict[str, Any], channel: Channel) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trainer = build(settings)
    Driver(trainer, Configuration.from_json(settings["configuration"]), channel)
    trainer.train()


def build(settings: dict[str, Any]) -> SDPOTrainer:
    """settings: folder, configuration, precision, objective, micro, cache, checkpointing."""
    c = Configuration.from_json(settings["configuration"])
    at, folder = c.lengths, Path(settings["folder"])
    args = SDPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, max_steps=10**6, seed=0,
        per_device_train_batch_size=at.samples // settings["micro"],
        gradient_accumulation_steps=settings["micro"],
        num_generations=at.samples, max_prompt_length=None, max_completion_length=at.response,
        shuffle_dataset=False, dataloader_pin_memory=False,
        gradient_checkpointing=settings["checkpointing"],
        bf16=settings["precision"] == "autocast", fp16=False, optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        cache_implementation=settings["cache"],
        generation_kwargs={"suppress_tokens": [PAD_ID, EOS_ID]},
        distillation_mode=settings["objective"], distillation_alpha=1.0, distillation_topk=TOP_K,
        teacher_model_kind="live", include_environment_feedback=True,
        use_successful_as_teacher=False, reprompt_template="{prompt}{feedback}",
        feedback_template=" {feedback_raw}",
    )  # fmt: skip
    data = [
        {
            "prompt": question(c.vocabulary, index, at.question),
            "privileged_context": feedback(c.vocabulary, index, at.feedback),
        }
        for index in range(ROWS)
    ]
    trainer = SDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[settings["precision"]]),
        args=args,
        reward_funcs=lambda completions, **columns: half_right(completions),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _seen(batch: dict[str, Any]) -> dict[str, Any]:
    """What the step's two roles saw, as ours reports it."""
    student = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return {
        "digest": digest(student.tolist(), batch["teacher_input_ids"].tolist()),
        "responses": (batch["completion_ids"] != PAD_ID).sum(1).tolist(),
    }


class Driver(TrainerCallback):
    """Meters a trainer and lets it take a step for every request."""

    def __init__(self, trainer: Any, configuration: Configuration, channel: Channel):
        self.trainer, self.configuration, self.channel = trainer, configuration, channel
        self.meter = Meter()
        self.memory: Memory | None = None
        self.found: dict[str, Any] = {}
        self.batch: dict[str, Any] = {}
        self.scripted_index: int | None = None
        self._optimizer_phase: Any = None
        self._meter_phases()
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.memory is None:  # the optimizer exists now
            self.memory = Memory()
            self.channel.send({"rest_bytes": self.memory.rest})
        request = self.channel.receive()  # do: step, with index in order from 0, and sampled
        self.scripted_index = None if request["sampled"] else request["index"]
        self.found = {"loss": 0.0}
        self.memory.start()
        self.meter.start()

    def on_self_distillation_batch_prepared(self, args, state, control, **batch) -> None:
        self.batch = batch

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._optimizer_phase = self.meter.phase("optimizer")
        self._optimizer_phase.__enter__()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._optimizer_phase.__exit__(None, None, None)
        assert self.memory is not None
        found = self.found | self.meter.read() | self.memory.read()
        self.channel.send(found | _seen(self.batch))

    def _meter_phases(self) -> None:
        trainer, meter = self.trainer, self.meter
        meter.wrap(trainer, "_prepare_training_batch", "rollout")
        meter.wrap(torch.autograd, "backward", "backward")
        self._watch(trainer, "_generate", self._generate)
        self._watch(trainer, "_clip_grad_norm", self._clip)
        self._watch(trainer, "compute_loss", self._loss)
        self._watch(trainer.model.get_decoder(), "forward", self._decode)

    def _watch(self, owner: Any, attribute: str, through: Any) -> None:
        function = getattr(owner, attribute)
        setattr(owner, attribute, lambda *args, **kwargs: through(function, *args, **kwargs))

    def _generate(self, function, prompt_ids):
        if self.scripted_index is None:
            return function(prompt_ids)
        c = self.configuration
        return prompt_ids, responses(c.vocabulary, self.scripted_index, c.lengths)

    def _clip(self, function, *args, **kwargs):
        with self.meter.phase("optimizer"):
            norm = function(*args, **kwargs)
        self.found["grad_norm"] = float(norm)
        return norm

    def _loss(self, function, *args, **kwargs):
        with self.meter.phase("head"):
            loss = function(*args, **kwargs)
        self.found["loss"] += float(loss.detach())
        return loss

    def _decode(self, function, *args, **kwargs):
        if self.meter.running != "head":  # sampling
            return function(*args, **kwargs)
        with self.meter.phase("student" if torch.is_grad_enabled() else "teacher"):
            return function(*args, **kwargs)
