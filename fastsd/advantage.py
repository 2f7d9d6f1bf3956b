"""`python -m fastsd.advantage`: what a context does to each token, of any model, without training.

The checkpoint answers the questions, each context is shown to it as its own teacher, and out come
the localisation figures and a page that shows the tokens. Nothing of a training run is made: no
optimizer, no second copy of the weights.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError
from fastsd.types import Prompt

if TYPE_CHECKING:
    from fastsd.config import Config
    from fastsd.evaluation.localisation import Localisation
    from fastsd.evaluation.solver import Solver
    from fastsd.evaluation.views import TokenView

USAGE = """usage: python -m fastsd.advantage CHECKPOINT DATA [--contexts reference,critique]
           [CONFIG.toml ...] [--questions N] [--samples K] [--json | --out FILE.html]
           [--section.key VALUE ...]

Where does each context press on the solver's own tokens? CHECKPOINT is a folder with a Hugging Face
model, a model's name, or chain_sum, the shipped base. DATA is a .jsonl or .parquet file of
questions, or a task's name. The model answers N questions K times (default 16 x 4); as its own
teacher it then reads each context, and A = log T - log S is taken on every token of the answers.

  --contexts A,B   what the teacher sees: reference (needs solutions), critique (needs a critic, see
                   --critic.kind and --critic.file), sibling (another right answer)
  --out FILE.html  the page that shows the tokens (default advantages.html)
  --json           no page; one JSON object with every number on stdout

Settings are found as by fastsd.evaluate: the run's own config.resolved.toml, or CONFIG.toml. Often
wanted: --rollout.max_new_tokens N, --report.rollouts N (of them on the page), --reward.function F;
all are listed by python -m fastsd.train --help."""

FILES = (".jsonl", ".parquet")
PAGE = "advantages.html"


class AdvantageError(FastsdError):
    """A command line that asks for what cannot be measured."""


@dataclass
class Request:
    """A parsed command line; settings are words for the configuration."""

    checkpoint: str
    data: str
    contexts: list[str] = field(default_factory=lambda: ["reference", "critique"])
    out: Path = Path(PAGE)
    json: bool = False
    settings: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    from fastsd.runtime.program import run_main

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        return 0 if words else 2
    return run_main(lambda: _run(parse(words)))


def parse(words: Sequence[str]) -> Request:
    """The command line; what is not ours goes to the configuration. Raises AdvantageError."""
    if len(words) < 2 or any(word.startswith("-") for word in words[:2]):
        raise AdvantageError(
            "name a checkpoint and its data before the flags, e.g. python -m fastsd.advantage "
            f"chain_sum chain_sum; found {' '.join(words[:2])}"
        )
    request, rest = Request(words[0], words[1]), list(words[2:])
    while rest:
        flag, equals, attached = rest.pop(0).partition("=")
        if flag == "--json":
            request.json = True
        elif flag in ("--contexts", "--out", "--questions", "--samples"):
            if not equals and (not rest or rest[0].startswith("--")):
                raise AdvantageError(f"{flag}: needs a value: {flag} VALUE")
            _set(request, flag, attached if equals else rest.pop(0))
        else:
            request.settings.append(flag + equals + attached)
    _check_contexts(request.contexts)
    return request


def _set(request: Request, flag: str, value: str) -> None:
    if flag == "--contexts":
        names = [name.strip() for name in value.split(",")]
        request.contexts = list(dict.fromkeys(name for name in names if name))
    elif flag == "--out":
        request.out = Path(value)
    else:
        request.settings += [flag.replace("--", "--report."), value]


def _check_contexts(names: Sequence[str]) -> None:
    from fastsd.conditions import CONDITIONS

    known = [name for name, condition in CONDITIONS.items() if condition.context]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        found = f"no context {unknown[0]!r}" if unknown else "no context is named"
        raise AdvantageError(f"--contexts: {found}; there are: {', '.join(known)}")


def request_config(request: Request) -> Config:
    """The configuration that the measurement runs under. Raises ConfigError, AdvantageError."""
    from fastsd.conditions import CONDITIONS
    from fastsd.config import for_condition
    from fastsd.evaluation.solver import checkpoint_config
    from fastsd.tasks import TASKS

    data, asks = request.data, [name for name in request.contexts if CONDITIONS[name].critic]
    if data in TASKS:
        source = ["--data.task", data, "--data.train", "none", "--data.eval", "none"]
    elif Path(data).suffix in FILES:
        source = ["--data.task", "none", "--data.train", data, "--data.eval", data]
    else:
        raise AdvantageError(
            f"DATA: {data!r} is neither a {' or '.join(FILES)} file nor a task ({', '.join(TASKS)})"
        )
    # What a training run's own condition and weights say does not matter here.
    own = ["--condition", "reference", "--teacher.kind", "live", "--resume", "never"]
    own += ["--loss.divergence_weight", "none", "--loss.policy_weight", "none"]
    config = checkpoint_config(request.checkpoint, [*request.settings, *source, *own])
    # A critic's settings are checked where a context asks it.
    config = for_condition(config, [*asks, *request.contexts][0])
    if config.report.questions == 0:
        raise AdvantageError("--questions: found 0, nothing would be measured; give 1 or more")
    return config


def open_solver(config: Config, contexts: Sequence[str], folder: Path) -> Solver:
    """folder: where a model critic's replies are kept, in critiques/, unless critic.cache says
    otherwise."""
    from fastsd.conditions import CONDITIONS
    from fastsd.evaluation.solver import Solver, refuse_damaged
    from fastsd.prompts.sources import required_fields

    refuse_damaged(config)
    shown = {n: CONDITIONS[n].needs for n in contexts}
    needs = {f: f'--contexts "{n}" shows it to the teacher' for n, f in shown.items() if f}
    return Solver(config, folder, {**required_fields(config), **needs})


def check(solver: Solver, contexts: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Raises FastsdError for what would fail only after the answers are sampled."""
    from fastsd.conditions import CONDITIONS

    for name in contexts:
        template = getattr(solver.config.prompt, CONDITIONS[name].template or "")
        solver.renderer.check_template(template, like=prompts[0])
        lacking = [p.id for p in prompts if CONDITIONS[name].needs and p.solution is None]
        if lacking:
            raise AdvantageError(
                f'--contexts: "{name}" needs a solution for every question, and '
                f"{lacking[0]!r} has none; leave the context out"
            )
        if CONDITIONS[name].critic and solver.critic is None:
            raise AdvantageError(
                f'--contexts: "{name}" needs a critic, and critic.kind = '
                f'"{solver.config.critic.kind}" has no rules for this data; set --critic.kind '
                "to local, server or replay"
            )
    for prompt in prompts:
        solver.renderer.check_question(prompt)


def _run(request: Request) -> None:
    from fastsd.evaluation.measure import held_out_rollouts, localise, measure

    start = time.perf_counter()
    config = request_config(request)
    solver = open_solver(config, request.contexts, request.out.parent)
    prompts = solver.eval_prompts(config.report.questions)
    check(solver, request.contexts, prompts)
    rollouts = held_out_rollouts(solver, prompts)
    views = measure(solver, rollouts, request.contexts, config.report.alternatives)
    places = localise(rollouts, views, request.contexts)
    if request.json:
        print(json.dumps(record(request, views, places), allow_nan=False))
        return
    print(f"{request.checkpoint}: {len(prompts)} questions of {request.data} x ", end="")
    print(f"{config.report.samples} samples, {time.perf_counter() - start:.1f} s")
    print(table(views, places))
    _write_page(request, config, solver, views, places)
    print(f"page: {request.out}")


def _write_page(
    request: Request,
    config: Config,
    solver: Solver,
    views: Sequence[TokenView],
    places: Mapping[str, Localisation],
) -> None:
    from fastsd.evaluation.views import choose_rollouts
    from fastsd.reporting.tokens import write_token_page

    request.out.parent.mkdir(parents=True, exist_ok=True)
    shown = choose_rollouts(views, config.report.rollouts)
    write_token_page(request.out, shown, places, task=solver.task)


def record(
    request: Request, views: Sequence[TokenView], places: Mapping[str, Localisation]
) -> dict[str, Any]:
    """What --json prints: localisation by context, and every view with its advantages."""
    return {
        "checkpoint": request.checkpoint,
        "data": request.data,
        "contexts": request.contexts,
        "localisation": {name: one.to_json() for name, one in places.items()},
        "views": [{**asdict(view), "advantage": view.advantage} for view in views],
    }


def table(views: Sequence[TokenView], places: Mapping[str, Localisation]) -> str:
    """Localisation as text, a column per context; below it what was left out, and why."""
    from fastsd.evaluation.summary import LOCALISATION_HEADERS, localisation_rows

    rows = localisation_rows({"localisation": {n: one.to_json() for n, one in places.items()}})
    counts = ["responses: wrong, right, not placed"]
    for one in places.values():
        counts.append(f"{one.wrong_responses}, {one.correct_responses}, {one.unplaced}")
    lines = [list(line) for line in zip(LOCALISATION_HEADERS, *rows, strict=True)] + [counts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    for name in places:
        problems = Counter(v.problem for v in views if v.context == name and v.problem)
        if problems:
            named = ", ".join(f"{problem} {count}" for problem, count in problems.most_common())
            text.append(f"{name}: {sum(problems.values())} responses without it ({named})")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
