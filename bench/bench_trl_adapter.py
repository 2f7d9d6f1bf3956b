"""TRL's self-distillation trainers as they are and with the adapter: time, memory, agreement.

    python -m bench.bench_trl_adapter [--vocabulary 32000] [--steps 6] [--json figures.json]

Both trainers start from the same random Llama, see the same scripted rollouts (no generation, so
the figures are the training half) and take the same optimizer steps; the teacher is the live model.
A step is `training_step`: batch, student and teacher forward, loss, backward. The first warms up,
the second is read for memory, the others for process CPU time. Agreement is relative L2: of the
losses of all steps, and of the worst weight tensor after the last; top-k supports may differ by an
entry that ties with another to rounding. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.utils import logging
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from bench.common import measure
from fastsd_kernels.adapters.trl import FusedLossHead
from fastsd_kernels.testing import relative_error

SCRIPT = "bench/bench_trl_adapter.py"
SPECIAL = ("<pad>", "<eos>", "<unk>")
CONFIGS = {SDPOTrainer: SDPOConfig, SDFTTrainer: SDFTConfig}
SETTINGS: dict[str, tuple[type, dict[str, Any]]] = {
    "SDPO sampled token (its default)": (SDPOTrainer, {}),
    "SDPO reverse KL": (SDPOTrainer, {"distillation_mode": "full_logits"}),
    "SDPO JSD 0.5": (SDPOTrainer, {"distillation_mode": "full_logits", "distillation_alpha": 0.5}),
    "SDPO top-100 + tail": (
        SDPOTrainer,
        {
            "distillation_mode": "topk_logits",
            "distillation_topk": 100,
            "distillation_add_tail": True,
        },
    ),
    "SDFT top-100 JSD (its default)": (SDFTTrainer, {}),
}


def fused(trainer: type) -> type:
    """The trainer with the adapter, as a user would write it."""
    return type(f"Fused{trainer.__name__}", (FusedLossHead, trainer), {})


def save_model(folder: Path, vocabulary: int, hidden: int, layers: int, tied: bool = True) -> Path:
    """A random Llama with logits of some spread, and a tokenizer with one token a word."""
    words = {w: i for i, w in enumerate([*SPECIAL, *(f"w{i}" for i in range(3, vocabulary))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=tied, initializer_range=hidden**-0.5,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def build_trainer(trainer: type, folder: Path, *, rows: int, completion: int, **config) -> Any:
    """A trainer on `folder`'s model whose rollouts of up to `completion` tokens are scripted."""
    words = [f"w{i}" for i in range(3, 50)]
    draw = random.Random(0)
    data = [
        {"prompt": " ".join(draw.choices(words, k=draw.randint(5, 9))),
         "privileged_context": " ".join(draw.choices(words, k=draw.randint(0, 20)))}
        for _ in range(32)
    ]  # fmt: skip
    base = next(kind for kind in CONFIGS if issubclass(trainer, kind))
    defaults: dict[str, Any] = dict(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, gradient_checkpointing=False, max_prompt_length=512,
        per_device_train_batch_size=rows, num_generations=rows, max_completion_length=completion,
        dataloader_pin_memory=False, learning_rate=1e-4, seed=0,
    )  # fmt: skip
    more: dict[str, Any] = {}
    if base is SDPOTrainer:
        defaults["include_environment_feedback"] = True
        more["reward_funcs"] = lambda completions, **_: [float(len(c) % 2) for c in completions]
    dtype = config.pop("dtype", torch.float32)
    built = trainer(
        model=config.pop("model", None)
        or AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        args=CONFIGS[base](**{**defaults, **config}),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **more,
    )

    def rollouts(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        script = random.Random(built.state.global_step)
        lengths = [script.randint((completion + 1) // 2, completion) for _ in prompt_ids]
        ends = [[1 if n < completion else 3] for n in lengths]  # <eos>, but where cut off
        drawn = [[script.randint(3, 49) for _ in range(n - 1)] for n in lengths]
        return prompt_ids, [ids + end for ids, end in zip(drawn, ends, strict=True)]

    built.remove_callback(PrinterCallback)
    built._generate = rollouts
    return built


def train(trainer: Any) -> dict:
    """Trains and returns losses, weights, CPU seconds per step and peak memory of one step."""
    step, seconds, peaks = trainer.training_step, [], []

    def measured(*args, **kwargs):
        if len(seconds) == 1:
            peak, loss = measure.peak_memory(lambda: step(*args, **kwargs), torch.device("cpu"))
            peaks.append(peak)
            seconds.append(None)
            return loss
        start = time.process_time()
        loss = step(*args, **kwargs)
        seconds.append(time.process_time() - start)
        return loss

    trainer.training_step = measured
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "logs": trainer.state.log_history,
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "cpu_s": statistics.median(seconds[2:]) if len(seconds) > 2 else None,
        "peak_bytes": peaks[0] if peaks else None,
    }


def disagreement(found: dict, expected: dict) -> tuple[float, float]:
    """Relative L2 difference of the losses of all steps, and the largest of any weight tensor."""
    losses = [torch.tensor(run["losses"], dtype=torch.float64) for run in (found, expected)]
    weights = [relative_error(found["weights"][name], w) for name, w in expected["weights"].items()]
    return relative_error(*losses), max(weights)


def compare(trainer: type, folder: Path, **config) -> dict:
    """One row of the table: the trainer as it is, then with the adapter."""
    theirs = train(build_trainer(trainer, folder, **config))
    ours = train(build_trainer(fused(trainer), folder, **config))
    loss, weights = disagreement(ours, theirs)
    figures = {"loss_difference": loss, "weight_difference": weights}
    for name, found in (("trl", theirs), ("fused", ours)):
        figures |= {f"{name}_{key}": found[key] for key in ("cpu_s", "peak_bytes")}
    return figures


def line(name: str, row: dict) -> str:
    """A row as text: CPU ms and peak MiB of TRL and of the adapter."""
    ms = " ->".join(f"{1000 * row[f'{who}_cpu_s']:8.0f}" for who in ("trl", "fused"))
    peaks = [row[f"{who}_peak_bytes"] for who in ("trl", "fused")]
    mib = " ->".join("     n/a" if p is None else f"{p / 2**20:8.0f}" for p in peaks)
    loss, weights = row["loss_difference"], row["weight_difference"]
    return f"{name:32} {ms} CPU ms {mib} MiB   differ by {loss:.1e} (loss) {weights:.1e} (weights)"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    sizes = {"vocabulary": 32000, "hidden": 256, "layers": 4, "rows": 4, "completion": 256}
    for name, default in {**sizes, "steps": 6, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="names, comma-separated")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.steps < 3:
        parser.error("--steps: expected at least 3 (warm-up, memory, time)")
    unknown = set(given.settings.split(",")) - set(SETTINGS)
    if unknown:
        parser.error(f"--settings: expected some of {', '.join(SETTINGS)}, got {sorted(unknown)}")
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_model(Path(scratch), given.vocabulary, given.hidden, given.layers)
        shape = {"rows": given.rows, "completion": given.completion, "max_steps": given.steps}
        for name in given.settings.split(","):
            trainer, options = SETTINGS[name]
            row = compare(trainer, folder, teacher_model_kind="live", **shape, **options)
            rows.append({"setting": name, **row})
            print(line(name, row), flush=True)
    facts = {"threads": given.threads, "shape": {name: getattr(given, name) for name in sizes}}
    found = measure.record(SCRIPT, torch.device("cpu"), rows, sys.argv[1:], **facts)
    measure.write(found, given.json)


if __name__ == "__main__":
    main()
