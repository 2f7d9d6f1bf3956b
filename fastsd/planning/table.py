"""A plan as text (tables of phases and of memory, then what follows from them) and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastsd.planning.fleet import Served
from fastsd.planning.hardware import ASSUMED, Seconds
from fastsd.planning.step import Plan

_GIB = 2**30


def render_plan(plan: Plan) -> str:
    """Lines for a terminal; everything is of one rank and one optimizer step."""
    return "\n".join(
        [
            *_head(plan),
            "",
            *_phases(plan),
            "",
            *_memory(plan),
            "",
            *_conclusions(plan),
            *(line for served in plan.served for line in _served(plan, served)),
            *_assumptions(plan),
        ]
    )


def _head(plan: Plan) -> list[str]:
    model, at = plan.model, plan.step.lengths
    precision = "bf16 with fp32 masters" if model.width < 4 else "fp32"
    checkpoints = ", gradient checkpointing" if model.checkpoints else ""
    site, devices = plan.site, "one rank"
    if site.ranks > 1:
        devices = f"{site.ranks} ranks, weights sharded, loss head {site.head} ({site.why})"
    return [
        f"condition {plan.condition} on {plan.hardware}: {devices}",
        f"{model.name}: {_count(model.parameters)} parameters, {_count(model.trainable)} of them "
        f"trained, {precision}{checkpoints}",
        f"a step of one rank: {plan.step.questions} questions of {at.question} tokens, "
        f"{at.samples} responses of {at.response} to each, feedback of {at.feedback}",
    ]


def _phases(plan: Plan) -> list[str]:
    full = {work.phase: work for work in plan.full}
    flop = [sum(work.flop for work in works) for works in (plan.works, plan.full)]
    unit, flops, moves = (1e12, "TFLOP", "GB") if flop[0] >= 1e12 else (1e9, "GFLOP", "MB")
    counted = ["tokens", flops, "unshared", moves, "unshared", f"link {moves}"]
    rows = [["phase", *counted, "seconds", "limit"]]
    for work, seconds in zip(plan.works, plan.seconds, strict=True):
        other = full.get(work.phase)
        rows.append([
            work.phase,
            f"{work.tokens:,.0f}" if work.tokens else "",
            _short(work.flop / unit),
            _short(other.flop / unit) if other else "",
            _short(1e3 * work.bytes / unit),
            _short(1e3 * other.bytes / unit) if other else "",
            _short(1e3 * work.link_bytes / unit),
            _range(seconds),
            seconds.limit,
        ])  # fmt: skip
    moved = [sum(work.bytes for work in works) for works in (plan.works, plan.full)]
    link = sum(work.link_bytes for work in plan.works)
    rows.append([
        "step", "", *(_short(x / unit) for x in flop), *(_short(1e3 * x / unit) for x in moved),
        _short(1e3 * link / unit), _range(Seconds(plan.low, plan.high, "")), "",
    ])  # fmt: skip
    return _table(rows)


def _memory(plan: Plan) -> list[str]:
    found = plan.memory
    unit, name = (_GIB, "GiB") if found.peak - found.runtime >= _GIB else (2**20, "MiB")

    def show(value: float) -> str:
        return f"{value / unit:.2f}" if unit == _GIB else f"{value / unit:,.1f}"

    rows = [["memory of a device", name, "when"]]
    for moment in ("resident", "rollouts", "training", "update"):
        when = "throughout" if moment == "resident" else moment
        rows += [
            [part, show(value), when] for part, value in getattr(found, moment).items() if value
        ]
    rows.append(["runtime", show(found.runtime), "throughout"])
    rows.append(["peak, with allocator slack", show(found.peak), found.moment])
    rows.append(["the same without shared prefixes", show(plan.full_memory.peak), ""])
    rows.append(["can be used", show(plan.capacity), ""])
    return _table(rows)


def _conclusions(plan: Plan) -> list[str]:
    lines = []
    if plan.micro_batch:
        fits = f"{plan.micro_batch:,} (set: {plan.step.budget:,})"
        lines.append(f"largest optim.micro_batch_tokens that fits: {fits}")
    if plan.rows:
        lines.append(
            f"most rollout.batch_rows that fit: {plan.rows:,} (set: {plan.step.batch_rows:,})"
        )
    if plan.missing:
        lines.append(f"DOES NOT FIT: {plan.missing / _GIB:.2f} GiB too few")
        lines += [f"  would fit with: {change}" for change in plan.changes]
    return lines


def _served(plan: Plan, served: Served) -> list[str]:
    generated = Seconds(served.low, served.high, "")
    lines = [
        f"{served.role} servers, {served.hardware}: {served.servers} of {served.devices} devices, "
        f"{served.rows} rows each; {_count(served.tokens_in)} tokens read and "
        f"{_count(served.tokens_out)} written a step in {_range(generated)} s "
        f"({served.seconds[-1].limit})"
    ]
    if served.sync_bytes:
        each = f"{served.sync_bytes / 1e9:.1f} GB"
        lines.append(f"  new weights: {each} to each server, {_range(served.sync)} s")
        both = [(plan.low, served.low, served.sync.low), (plan.high, served.high, served.sync.high)]
        (low, high) = (max(train, roll) + sync for train, roll, sync in both)
        beside = Seconds(low, high, "")
        after = Seconds(sum(both[0]), sum(both[1]), "")
        lines.append(
            f"  a step with rollouts one version behind: {_range(beside)} s; in turns: "
            f"{_range(after)} s"
        )
    return lines


def _assumptions(plan: Plan) -> list[str]:
    here = plan.hardware.startswith("cpu")
    said = (
        [
            "rates measured here at these shapes, on this process's threads: fastest and median "
            "round; other programs' share of caches and memory is as it was meanwhile"
        ]
        if here
        else ["predicted, not measured: data-sheet peaks (fastsd/planning/hardware_table.toml)"]
    )
    said += [] if here else ASSUMED.lines()
    said.append("all responses have the mean length, and every group has a signal")
    return ["", "assumed:", *(f"  {line}" for line in (*said, *plan.notes))]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _short(value: float) -> str:
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _range(seconds: Seconds) -> str:
    return f"{_short(seconds.low) or '0'} to {_short(seconds.high) or '0'}"


def _count(value: float) -> str:
    for size, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.0f}"


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan in plain values; bytes, operations and seconds of one rank."""
    return {
        "condition": plan.condition,
        "hardware": plan.hardware,
        "ranks": plan.site.ranks,
        "loss_head": {"layout": plan.site.head, "why": plan.site.why},
        "model": {
            name: getattr(plan.model, name)
            for name in ("name", "parameters", "trainable", "layers", "hidden", "vocabulary")
        },
        "lengths": asdict(plan.step.lengths),
        "questions_a_rank": plan.step.questions,
        "phases": _phases_json(plan),
        "step_seconds": [plan.low, plan.high],
        "memory_bytes": {
            "peak": plan.memory.peak,
            "usable": plan.capacity,
            "without_sharing": plan.full_memory.peak,
            "moment": plan.memory.moment,
            "runtime": plan.memory.runtime,
            **{
                name: dict(getattr(plan.memory, name))
                for name in ("resident", "rollouts", "training", "update")
            },
        },
        "largest_micro_batch_tokens": plan.micro_batch,
        "largest_batch_rows": plan.rows,
        "servers": [_served_json(served) for served in plan.served],
        "notes": list(plan.notes),
        "changes": list(plan.changes),
    }


def _phases_json(plan: Plan) -> list[dict[str, Any]]:
    full = {work.phase: work for work in plan.full}
    phases = []
    for work, seconds in zip(plan.works, plan.seconds, strict=True):
        record = {"phase": work.phase, "tokens": work.tokens, "passes": work.passes}
        record |= {"flop": work.flop, "bytes": work.bytes, "link_bytes": work.link_bytes}
        record |= {"seconds": [seconds.low, seconds.high], "limit": seconds.limit}
        if work.phase in full:
            other = full[work.phase]
            record["without_sharing"] = {"flop": other.flop, "bytes": other.bytes}
        phases.append(record)
    return phases


def _served_json(served: Served) -> dict[str, Any]:
    names = ("role", "hardware", "servers", "devices", "rows", "tokens_in", "tokens_out")
    return {name: getattr(served, name) for name in names} | {
        "seconds": [served.low, served.high],
        "sync_bytes": served.sync_bytes,
        "sync_seconds": [served.sync.low, served.sync.high],
    }
