"""Run folders for the report's tests, made by hand, and their page as it is read back."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

from fastsd.evaluation.localisation import Localisation, Region
from fastsd.evaluation.results import EvalResult, tabulate
from fastsd.evaluation.summary import summarise
from fastsd.records.completions import CompletionRow, write_completions
from fastsd.records.folder import (
    MetricsWriter,
    append_evaluation,
)
from fastsd.types import Prompt, Rollout

PAYLOAD = "<script>alert(1)</script>{{7*7}}{% raw %}\"'><img src=http://evil.example/x>$x_1$[b]"


def result_of(correct_QK) -> EvalResult:
    """An evaluation whose samples are right and wrong as given."""
    prompts = [Prompt(f"q{q}", ({"role": "user", "content": "?"},)) for q in range(len(correct_QK))]
    marks = [
        (prompt, mark) for prompt, row in zip(prompts, correct_QK, strict=True) for mark in row
    ]
    rollouts = [Rollout(prompt, 0, (1,), (0.0,), "x", False) for prompt, _ in marks]
    answers = ["right" if mark else "wrong" for _, mark in marks]
    return tabulate(rollouts, [float(mark) for _, mark in marks], answers, len(correct_QK[0]))


BASE = result_of([[0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]])


BETTER = result_of([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]])


BEST = result_of([[1, 1, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]])


FOUND = Localisation(
    before=Region(10, 1.0, 0.5, 4),
    at=Region(4, 6.0, 5.0, 3),
    after=Region(6, 3.0, 2.0, 3),
    correct=Region(20, 1.0, 0.4, 5),
    peak=5.0,
    wrong_responses=1,
    correct_responses=1,
)


def build_run(folder, payload="plain", seeds=(0, 1)):
    """A finished comparison as the experiment leaves it, with `payload` in every free text."""
    for condition, final in (("grpo", BETTER), ("critique", BEST)):
        for seed in seeds:
            child = folder / f"{condition}-seed{seed}"
            child.mkdir(parents=True)
            with MetricsWriter(child) as writer:
                for step in (1, 2, 3):
                    metrics = {"reward/mean": step / 4, "entropy/mean": 1 / step, "loss": math.nan}
                    writer.write(step, {**metrics, "length/mean": 19.0})
            append_evaluation(child, 0, BASE)
            append_evaluation(child, 3, final)
            prompt = Prompt("q", ({"role": "user", "content": payload},))
            rollout = Rollout(prompt, 0, (1,), (0.0,), payload, False, 0.0)
            write_completions(child, 3, [CompletionRow(rollout, 0.5, payload, 0.1)] * 2)
    (folder / "config.resolved.toml").write_text(
        f"condition = 'all'\nmodel.name = {json.dumps(payload)}\n[data]\ntask = 'chain_sum'\n"
        "[optim]\nlr = 3e-4\nsteps = 3\n"
    )
    finals = {"grpo": [BETTER] * len(seeds), "critique": [BEST] * len(seeds)}
    places = {"reference": FOUND, "critique": FOUND}
    summary = summarise(finals, BASE, localisation=places, task="chain_sum", seconds=61.2)
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
