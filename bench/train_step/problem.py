"""One optimizer step's problem: shapes, questions, feedback texts and scripted responses.

Every text is a function of an index, so that processes which never meet work on the same tokens. A
token is a word ("w123") and the templates add none: a prompt of n words has n tokens in every
trainer. The model and its tokenizer are in train_step_model.py.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from typing import Any

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD_ID, EOS_ID = 0, 1
# Questions in a data set, and so the steps after which they come again.
ROWS = 64
TEACHER_TEMPLATE = "{question} {feedback}"
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Lengths:
    """Tokens of the question, of a feedback text and of a response, and responses a question."""

    question: int
    feedback: int
    response: int
    samples: int


@dataclass(frozen=True)
class Configuration:
    """A Llama with tied embeddings, and the lengths of its training step."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    lengths: Lengths

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Configuration:
        return cls(**{**record, "lengths": Lengths(**record["lengths"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _llama_14m(name: str, *lengths: int) -> Configuration:
    return Configuration(name, 256, 704, 8, 4, 2, 32000, Lengths(*lengths))


def _smollm2(name: str, *lengths: int) -> Configuration:
    """SmolLM2-135M's shape."""
    return Configuration(name, 576, 1536, 30, 9, 3, 49152, Lengths(*lengths))


CONFIGURATIONS = {
    found.name: found
    for found in (
        Configuration("tiny", 32, 64, 2, 4, 2, 300, Lengths(12, 20, 8, 4)),
        _llama_14m("llama14m", 128, 256, 256, 4),
        _smollm2("smollm2", 256, 256, 64, 8),
        _smollm2("prompt_heavy", 1024, 512, 128, 8),
    )
}


def question(vocabulary: int, index: int, tokens: int, sample: int = 0) -> str:
    """The index-th question; sample > 0: another one of the same length."""
    return _words(vocabulary, f"question {index} {sample}", tokens)


def feedback(vocabulary: int, index: int, tokens: int, sample: int = 0) -> str:
    """The index-th question's feedback text; sample > 0: another one of the same length."""
    return _words(vocabulary, f"feedback {index} {sample}", tokens)


def responses(vocabulary: int, index: int, lengths: Lengths) -> list[list[int]]:
    """Token ids of `lengths.samples` scripted responses to the index-th question."""
    return [
        _ids(vocabulary, f"response {index} {sample}", lengths.response)
        for sample in range(lengths.samples)
    ]


def half_right(completions: list, **columns: Any) -> list[float]:
    """A reward with spread in every group: every second response is right."""
    return [float(i % 2) for i in range(len(completions))]


def digest(*rows_of_roles: list[list[int]]) -> str:
    """Equal for two trainers that put the same tokens, in the same order, through each role."""
    return hashlib.sha256(json.dumps(rows_of_roles).encode()).hexdigest()


def _ids(vocabulary: int, key: str, count: int) -> list[int]:
    draw = random.Random(key)
    return [draw.randrange(len(SPECIAL), vocabulary) for _ in range(count)]


def _words(vocabulary: int, key: str, count: int) -> str:
    return " ".join(f"w{i}" for i in _ids(vocabulary, key, count))
