"""The step bench's measurements: who is alive together, in what order they are asked, what is kept.

All processes of a group are alive and take turns in every round; whoever fails is out, with the
reason in its row. Rows have medians over the rounds and the highest peak of memory. Nothing is
timed that disagrees: equal tokens, and loss and gradient norm of a first, scripted step within
AGREEMENT of each other. Nor what computes other rows than `count` says.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.common import measure
from bench.train_step.count import CONDITIONS, Work, count, flop
from bench.train_step.names import settings_of
from bench.train_step.problem import Configuration, Lengths
from bench.train_step.worker import ContestantFailed, Worker

# Relative differences from the first fp32 contestant. In fp32 only the order of sums differs; bf16
# rounds to 2^-9, and thousands of such errors average out.
AGREEMENT = {"fp32": 1e-4, "bf16": 1e-2, "autocast": 1e-2}
TRAINING = ("student", "teacher", "head", "backward")
NETWORK = ("student", "teacher", "backward")
# --scaling: factors of the configuration's lengths; numbers of responses, also of those for which
# the question varies.
RESPONSES, QUESTIONS = (0.5, 1, 2, 4), (0.25, 0.5, 1, 2, 4)
SAMPLES, SAMPLES_BY_QUESTION = (1, 2, 4, 8, 16), (1, 4, 16)

Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """folder: of `save_model`. gemm_size: of the square products that give the machine's rate."""

    folder: Path
    configuration: Configuration
    threads: int
    rounds: int
    gemm_size: int = 4096


class Group:
    """Contestants alive together, by name. facts: what each said when loaded. failed: why others
    are not alive any more."""

    def __init__(self, setup: Setup, settings: Mapping[str, dict[str, Any]]):
        self._setup, self._settings = setup, settings
        self._alive: dict[str, Worker] = {}
        self._stack = contextlib.ExitStack()
        self.failed: dict[str, str] = {}
        self.facts: dict[str, Row] = {}

    def __enter__(self) -> Group:
        common = {
            "folder": str(self._setup.folder),
            "configuration": self._setup.configuration.to_json(),
            "threads": self._setup.threads,
        }
        for name, settings in self._settings.items():
            worker = Worker(common | settings, self._setup.folder / f"{name}.log")
            self._alive[name] = self._stack.enter_context(worker)
        self.facts = self._everybody(Worker.loaded)
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def round(self, **request: Any) -> dict[str, Row]:
        """Everybody's answer to the request, one after the other."""
        return self._everybody(lambda worker: worker.ask(**request))

    def _everybody(self, does: Callable[[Worker], Row]) -> dict[str, Row]:
        answers = {}
        for name in list(self._alive):
            try:
                answers[name] = does(self._alive[name])
            except ContestantFailed as error:
                self.failed[name] = str(error)
                del self._alive[name]
        return answers


def steps(setup: Setup, groups: Sequence[Sequence[str]]) -> list[Row]:
    """Rows of whole optimizer steps: after the scripted one, one that warms up generation."""
    rows = [row for names in groups for row in _steps(setup, names)]
    judge(rows)
    return rows


def _steps(setup: Setup, names: Sequence[str]) -> list[Row]:
    settings = {name: settings_of(name) for name in names}
    rounds, rates = [], []
    with Group(setup, settings) as group, Group(setup, {"gemm": {"engine": "gemm"}}) as machine:
        for index in range(setup.rounds + 2):
            rounds.append(group.round(do="step", index=index, sampled=index > 0))
            rates.append(
                {
                    precision: machine.round(precision=precision, size=setup.gemm_size)["gemm"]
                    for precision in ("fp32", "bf16")
                }
            )
    rows = []
    for name in names:
        row = {"configuration": setup.configuration.name, "contestant": name, **settings[name]}
        if name in group.failed:
            rows.append(row | {"why_not": group.failed[name]})
            continue
        answers = [found[name] for found in rounds]
        row |= group.facts[name] | {key: answers[0][key] for key in ("loss", "grad_norm", "digest")}
        row |= summary(answers[2:]) | {"peak_bytes": max(a["peak_bytes"] for a in answers)}
        try:
            _check_lengths(setup.configuration.lengths, answers)
            if row["engine"] == "fastsd":
                row |= _work(setup, row, answers, rates)
        except ValueError as error:
            row["disagrees"] = str(error)
        rows.append(row)
    return rows


def _work(setup: Setup, row: Row, answers: Sequence[Row], rates: Sequence[Row]) -> Row:
    """Counted operations, and the time at the GEMM rate as a share of the training half's."""
    at = setup.configuration.lengths
    work = _checked_work(at, row["condition"], True, answers)
    parts = flop(setup.configuration, at, work)
    found: Row = {"flop": parts}
    for clock in ("cpu", "wall"):
        gemms = [rate[row["precision"]] for rate in rates]
        rate = statistics.median(gemm["flop"] / gemm[clock] for gemm in gemms)
        spent = statistics.median(seconds(a, TRAINING, clock) for a in answers[2:])
        found |= {f"gemm_{clock}": rate, f"share_{clock}": sum(parts.values()) / rate / spent}
    return found


def judge(rows: Sequence[Row]) -> None:
    """Writes `disagrees` into rows that are not the same step as the first in fp32."""
    same = [row for row in rows if "loss" in row and _objective(row) == "reference"]
    base = next((row for row in same if row["precision"] == "fp32"), None)
    for row in same:
        if base is None or "disagrees" in row:
            continue
        if row["digest"] != base["digest"]:
            row["disagrees"] = f"other tokens than {base['contestant']}"
        for name in ("loss", "grad_norm"):
            error = abs(row[name] - base[name]) / abs(base[name])
            if not error <= AGREEMENT[row["precision"]]:
                row["disagrees"] = f"{name} {row[name]:.6g}, {base['contestant']} {base[name]:.6g}"


def _objective(row: Row) -> str:
    """ "reference" for one feedback text and the full vocabulary."""
    full = row.get("objective", "full_logits") == "full_logits"
    return row.get("condition", "reference") if full else row["objective"]


def generation(setup: Setup, groups: Sequence[Sequence[str]]) -> list[Row]:
    """Rollouts alone: one question, one four times as long, four questions."""
    at, rows = setup.configuration.lengths, []
    for names in groups:
        with Group(setup, {name: settings_of(name) for name in names}) as group:
            for questions, factor in ((1, 1), (1, 4), (4, 1)):
                tokens = factor * at.question
                request = {"do": "generate", "questions": questions, "tokens": tokens}
                rounds = [group.round(index=i, **request) for i in range(setup.rounds + 1)]
                for name in names:
                    row = {"contestant": name, **settings_of(name), "question": tokens,
                           "rows": questions * at.samples}  # fmt: skip
                    rows.append(row | _generated(name, at, rounds, group))
    return rows


def _generated(name: str, at: Lengths, rounds: Sequence[dict[str, Row]], group: Group) -> Row:
    if name in group.failed:
        return {"why_not": group.failed[name]}
    answers = [found[name] for found in rounds]
    found = summary(answers[1:])
    tokens = sum(answers[0]["responses"])
    found["tokens_per_second"] = tokens / found["wall"]
    if set(answers[0]["responses"]) != {at.response}:
        found["disagrees"] = f"responses of {sorted(set(answers[0]['responses']))} tokens"
    return found


def sharing(setup: Setup, precision: str) -> list[Row]:
    """The training half with and without sharing, beside the ratio of tokens, by condition."""
    at, rows = setup.configuration.lengths, []
    for condition in CONDITIONS:
        plain = settings_of(f"fastsd-{precision}") | {"condition": condition}
        both = {"shared": plain, "unshared": plain | {"shared": False}}
        with Group(setup, both) as group:
            rounds = [group.round(do="step", index=i, sampled=False)
                      for i in range(setup.rounds + 1)]  # fmt: skip
        row = {"configuration": setup.configuration.name, "condition": condition,
               "precision": precision}  # fmt: skip
        if group.failed:
            rows.append(row | {"why_not": "; ".join(group.failed.values())})
            continue
        answers = {name: [found[name] for found in rounds] for name in both}
        units = {name: _checked_work(at, condition, name == "shared", found).units
                 for name, found in answers.items()}  # fmt: skip
        row |= {name: summary(found[1:]) for name, found in answers.items()}
        counted = units["unshared"] / units["shared"]
        row |= {"units": units, "counted": counted}
        for name, phases in (("network", NETWORK), ("half", TRAINING)):
            spent = {who: statistics.median(seconds(a, phases) for a in found[1:])
                     for who, found in answers.items()}  # fmt: skip
            ratio = spent["unshared"] / spent["shared"]
            row |= {f"measured_{name}": ratio, f"share_{name}": ratio / counted}
        rows.append(row)
    return rows


def scaling(setup: Setup, precision: str) -> list[Row]:
    """Time of student, teacher and head along the lengths of response, group and question, and a
    row for the line through each series."""
    at = setup.configuration.lengths
    series: dict[tuple[str, int], list[Lengths]] = {
        ("response", at.samples): [replace(at, response=_times(at.response, f)) for f in RESPONSES],
        ("samples", 0): [replace(at, samples=samples) for samples in SAMPLES],
    }
    for samples in SAMPLES_BY_QUESTION:
        points = [replace(at, question=_times(at.question, f), samples=samples) for f in QUESTIONS]
        series["question", samples] = points
    spent = _time_points(setup, precision, {point for line in series.values() for point in line})
    rows: list[Row] = []
    for (axis, samples), points in series.items():
        xs = [float(getattr(point, axis)) for point in points]
        ys = [spent[point]["cpu"] for point in points]
        start, slope, r2 = measure.linear_fit(xs, ys)
        rows.append({"axis": axis, "samples": samples, "x": xs, "cpu": ys,
                     "wall": [spent[point]["wall"] for point in points],
                     "start": start, "slope": slope, "r2": r2})  # fmt: skip
    return rows


def _times(length: int, factor: float) -> int:
    return max(1, round(length * factor))


def _time_points(setup: Setup, precision: str, points: Iterable[Lengths]) -> dict[Lengths, Row]:
    """Median seconds of the training half at each point; the points take turns."""
    # The largest first, so that later ones find the memory there.
    ordered = sorted(points, key=lambda p: -count(p, "reference").units)
    found: dict[Lengths, list[Row]] = {point: [] for point in ordered}
    with Group(setup, {"fastsd": settings_of(f"fastsd-{precision}")}) as group:
        for index in range(setup.rounds + 1):
            for point in ordered:
                lengths = asdict(point)
                answers = group.round(do="step", index=index, sampled=False, lengths=lengths)
                if group.failed:
                    raise ContestantFailed(group.failed["fastsd"])
                found[point].append(answers["fastsd"])
    for point, answers in found.items():
        _checked_work(point, "reference", True, answers)
    return {
        point: {
            clock: statistics.median(seconds(a, TRAINING, clock) for a in answers[1:])
            for clock in ("cpu", "wall")
        }
        for point, answers in found.items()
    }


def summary(answers: Sequence[Row]) -> Row:
    """cpu, wall and phases ({name: [cpu, wall]}): medians; cpu_rounds; peak_bytes: the highest."""
    phases = {
        name: [statistics.median(seconds(a, (name,), clock) for a in answers)
               for clock in ("cpu", "wall")]
        for name in answers[0]["phases"]
    }  # fmt: skip
    return {
        "cpu": statistics.median(a["cpu"] for a in answers),
        "wall": statistics.median(a["wall"] for a in answers),
        "cpu_rounds": [a["cpu"] for a in answers],
        "phases": phases,
        "peak_bytes": max(a["peak_bytes"] for a in answers),
    }


def seconds(answer: Row, phases: Sequence[str], clock: str = "cpu") -> float:
    """Seconds of some phases of one answer."""
    place = ("cpu", "wall").index(clock)
    return sum(answer["phases"].get(name, [0.0, 0.0])[place] for name in phases)


def _checked_work(at: Lengths, condition: str, shared: bool, answers: Sequence[Row]) -> Work:
    """`count`; raises ValueError where the trainer computed other rows."""
    work = count(at, condition, shared)
    wanted = {"student": work.student.tokens, "teacher": work.teacher.tokens}
    wanted = {role: tokens for role, tokens in wanted.items() if tokens}
    for answer in answers:
        if answer["tokens"] != wanted:
            raise ValueError(f"{condition}: computed {answer['tokens']} tokens, counted {wanted}")
    return work


def _check_lengths(at: Lengths, answers: Sequence[Row]) -> None:
    for answer in answers:
        if answer["responses"] != [at.response] * at.samples:
            raise ValueError(f"responses have {answer['responses']} tokens, not {at.response}")
