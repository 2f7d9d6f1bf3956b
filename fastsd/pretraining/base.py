"""Makes chain_sum's base checkpoint: `python -m fastsd.pretrain chain_sum --out DIR`.

The embedded experiment needs a base that can read a hint and is wrong in a stable way. Trainings
of this size are a matter of luck: some seeds get stuck at a half-learned grammar, and post-training
from such a base turns the ordering of the conditions around. So a base has to pass a health gate
(`HealthGate`) before it is saved; a seed that fails is reported and the next one is tried.

`fit` is the supervised loop, shared with the warm-up of real models: ragged examples, loss on the
completions only, float32 master weights whatever the model's own type.

    T completion tokens of a batch, V vocabulary, D hidden, B examples, L padded length
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastsd.config.sections import OptimConfig
from fastsd.errors import TrainingDiverged
from fastsd.pretraining.chain_sum_author import HINTED_SHARE, Author
from fastsd.pretraining.char_model import ANSWER, EOS, QUESTION, make_model, make_tokenizer
from fastsd.tasks.chain_sum import STEPS, ChainSum, judge
from fastsd.training.optimizer import Optimizer

Example = tuple[Sequence[int], Sequence[int]]


def completion_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross entropy (float32 scalar) over all completion tokens of (prompt, completion) ids.

    model: a causal language model of transformers, whose types say less than the code knows.
    Examples are padded on the right and attention is causal, so padding needs no mask: no real
    token sees it. Logits exist for the rows that predict a completion token only.
    """
    length = max(len(prompt) + len(completion) for prompt, completion in batch)
    device = model.get_input_embeddings().weight.device
    ids_BL = torch.zeros(len(batch), length, dtype=torch.long)
    row_of_T, target_T = [], []
    for b, (prompt, completion) in enumerate(batch):
        if not prompt or not completion:
            raise ValueError(f"example {b} of the batch has an empty prompt or completion")
        ids_BL[b, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        first = b * length + len(prompt) - 1
        row_of_T.extend(range(first, first + len(completion)))
        target_T.extend(completion)
    hidden_BLD = model.base_model(input_ids=ids_BL.to(device), use_cache=False).last_hidden_state
    hidden_TD = hidden_BLD.flatten(0, 1)[torch.tensor(row_of_T, device=device)]
    logits_TV = model.get_output_embeddings()(hidden_TD)
    return F.cross_entropy(logits_TV.float(), torch.tensor(target_T, device=device))


def flat_then_linear(steps: int, floor: float = 0.05) -> Callable[[int], float]:
    """Learning-rate factor of update i: 1 for the first half, then linear down to `floor`."""
    return lambda i: max(floor, min(1.0, 2.0 - 2.0 * i / steps))


def fit(
    model: Any,
    batches: Iterable[Sequence[Example]],
    *,
    lr: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    schedule: Callable[[int], float] = lambda update: 1.0,
    max_grad_norm: float = 1.0,
    freeze: Sequence[str] = (),
    log: Callable[[int, float], None] = lambda update, loss: None,
) -> None:
    """Supervised AdamW: one update per batch of (prompt_ids, completion_ids), until they run out.

    lr * min(1, (i + 1) / warmup_steps) * schedule(i) is the rate of update i. Parameters whose name
    contains one of `freeze`, or that need no gradient already, stay as they are. The optimizer is
    the trainer's own: float32 master weights, no decay of biases and norms, and a batch whose
    gradient is not finite changes nothing. log(updates_done, loss) is called after every update.

    Raises ValueError for an empty prompt or completion, TrainingDiverged for a non-finite loss.
    """
    for name, parameter in model.named_parameters():
        if any(part in name for part in freeze):
            parameter.requires_grad_(False)
    decay = {"weight_decay": weight_decay, "betas": betas, "max_grad_norm": max_grad_norm}
    config = OptimConfig(lr=lr, warmup_steps=warmup_steps, **decay)
    optimizer = Optimizer(model, config)
    model.train()
    for update, batch in enumerate(batches):
        loss = completion_loss(model, batch)
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"the loss of update {update} is {loss.item()}; lower the lr")
        loss.backward()
        optimizer.config = config.model_copy(update={"lr": lr * schedule(update)})
        optimizer.step()
        log(update + 1, loss.item())
    model.eval()


@dataclass(frozen=True)
class Recipe:
    """How the base is trained. The defaults make the shipped one."""

    seed: int = 3
    steps: int = 2000
    lr: float = 2e-3
    batch_size: int = 64
    warmup_steps: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True)
class Health:
    """What a base can do. valid_left_sides: share of sampled responses whose left sides are all
    right; hint_loss: cross entropy (nats per token) with a hint; avg_at_12: share of right totals.
    All on held-out questions, sampled at T = 1."""

    valid_left_sides: float
    hint_loss: float
    avg_at_12: float


@dataclass(frozen=True)
class HealthGate:
    """The least that a base must reach: below it, the comparison of the conditions breaks."""

    min_valid_left_sides: float = 0.97
    max_hint_loss: float = 0.09

    def passes(self, health: Health) -> bool:
        return (
            health.valid_left_sides >= self.min_valid_left_sides
            and health.hint_loss <= self.max_hint_loss
        )


def encode(tokenizer, pairs: Iterable[tuple[str, str]]) -> list[Example]:
    """(user turn, response) texts -> (prompt_ids, completion_ids), as the chat template does."""
    return [
        (
            tokenizer.encode(f"{QUESTION}{user_turn}{ANSWER}"),
            tokenizer.encode(f"{response}{EOS}"),
        )
        for user_turn, response in pairs
    ]


def base_batches(tokenizer, author: Author, recipe: Recipe) -> Iterator[list[Example]]:
    """The base's training data: each batch all with or all without hints."""
    rng = random.Random(f"writing {recipe.seed}")
    for _ in range(recipe.steps):
        hinted = rng.random() < HINTED_SHARE
        yield encode(tokenizer, author.examples(recipe.batch_size, rng, hinted))


@torch.no_grad()
def measure(model, tokenizer, author: Author, questions: int = 128, samples: int = 12) -> Health:
    """Health on held-out questions; the same questions for every base. About 2 s."""
    task, rng = ChainSum(), random.Random("health")
    asked = [task.prompt("eval", i).question for i in range(questions) for _ in range(samples)]
    prompts_BL = torch.tensor([prompt for prompt, _ in encode(tokenizer, ((q, "") for q in asked))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids_BL = model.generate(
            prompts_BL, attention_mask=torch.ones_like(prompts_BL), do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=24,
        )  # fmt: skip
    responses = tokenizer.batch_decode(ids_BL[:, prompts_BL.shape[1] :], skip_special_tokens=True)
    judged = [list(judge(q, response)) for q, response in zip(asked, responses, strict=True)]
    valid = [len(steps) == STEPS and all(step.operands_ok for step in steps) for steps in judged]
    hinted = encode(tokenizer, author.examples(1024, rng, hinted=True, split="eval"))
    return Health(
        valid_left_sides=sum(valid) / len(valid),
        hint_loss=completion_loss(model, hinted).item(),
        avg_at_12=task.reward(asked, responses).count(1.0) / len(asked),
    )


def train_base(recipe: Recipe, log: Callable[[str], None] = print):
    """One base from scratch -> (model, tokenizer, Health)."""
    tokenizer, author = make_tokenizer(), Author(recipe.seed)
    model = make_model(tokenizer, recipe.seed)
    start, losses = time.perf_counter(), []

    def log_update(update: int, loss: float) -> None:
        losses.append(loss)
        if update % 250 == 0:
            mean, seconds = sum(losses[-250:]) / 250, time.perf_counter() - start
            log(f"  update {update} of {recipe.steps}: loss {mean:.4f}, {seconds:.0f} s")

    fit(
        model,
        base_batches(tokenizer, author, recipe),
        lr=recipe.lr,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        schedule=flat_then_linear(recipe.steps),
        log=log_update,
    )
    return model, tokenizer, measure(model, tokenizer, author)


def pretrain(out: Path, recipe: Recipe, gate: HealthGate, max_seeds: int) -> bool:
    """Trains bases from recipe.seed upwards until one passes the gate, and saves that one in `out`.

    `out` becomes a Hugging Face folder (safetensors, tokenizer, chat template, generation config)
    with pretrain.json: the recipe, the gate, and the health of every seed tried. False, and nothing
    written, when none of max_seeds passes.
    """
    tried = []
    for seed in range(recipe.seed, recipe.seed + max_seeds):
        this = replace(recipe, seed=seed)
        print(f"seed {seed}", flush=True)
        start = time.perf_counter()
        model, tokenizer, health = train_base(this, log=lambda line: print(line, flush=True))
        seconds = round(time.perf_counter() - start, 1)
        tried.append({"seed": seed, "seconds": seconds, **asdict(health)})
        print(f"  {'passes' if gate.passes(health) else 'FAILS'} the gate: {health}", flush=True)
        if gate.passes(health):
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            record = {"recipe": asdict(this), "gate": asdict(gate), "tried": tried}
            (out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
            return True
    return False
