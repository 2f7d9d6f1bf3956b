"""TRL's own SDPO trainer with fastsd's loss head: one base class more, no [B, T, V] logits.

    pip install 'trl>=1.16'
    python examples/trl_sdpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 5

Config, data, callbacks, metrics and checkpoints stay TRL's.
"""

import argparse
import os
import tempfile

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from fastsd_kernels.adapters.trl import FusedLossHead


class FusedSDPOTrainer(FusedLossHead, SDPOTrainer):
    """All that changes."""


def right_sum(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion holds the answer."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(wanted in text) for text, wanted in zip(texts, answer, strict=True)]


def rows(count: int) -> Dataset:
    pairs = [(a, 3 * a + 7) for a in range(10, 10 + count)]
    return Dataset.from_list(
        [
            {
                "prompt": f"What is {a} + {b}?",
                "privileged_context": f"{a} + {b} = {a + b}.",
                "answer": str(a + b),
            }
            for a, b in pairs
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--out", default=None, help="folder of checkpoints; none: not kept")
    arguments = parser.parse_args()
    config = SDPOConfig(
        output_dir=arguments.out or tempfile.mkdtemp(),
        save_strategy="no" if arguments.out is None else "steps",
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=arguments.max_new_tokens,
        include_environment_feedback=True,
        distillation_mode="full_logits",
        distillation_alpha=1.0,  # KL(S||T)
        logging_steps=1,
        report_to=[],
        bf16=False,
    )
    trainer = FusedSDPOTrainer(
        model=arguments.model, args=config, train_dataset=rows(8), reward_funcs=right_sum
    )
    trainer.train()


if __name__ == "__main__":
    main()
