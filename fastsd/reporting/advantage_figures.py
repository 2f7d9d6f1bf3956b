"""Where the self-teacher presses, drawn: the paper's Figure 4 with your data, and what it pools.

    response      A of every token of one wrong response, a panel per context
    profile       mean |A| by position relative to the first wrong step
    distribution  how A is distributed on right steps, on the first wrong one and on later ones

A = log T(y_t) - log S(y_t): below 0 the teacher, who sees the feedback, would rather not have
written the token. All three are drawn from TokenViews (`fastsd.evaluation.views`), as files (SVG,
PNG) of a run and as inline SVG for its page. Text of the data is shortened, made printable and
escaped.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd.evaluation.localisation import Localisation
from fastsd.evaluation.views import TokenView, by_rollout
from fastsd.reporting.advantage_profile import (
    BINS,
    PLACES,
    distributions,
    places,
    profiles,
    shown_response,
    wrong_tokens,
)
from fastsd.reporting.plots import INK, LABEL, OTHER_STYLE, SETTINGS, STYLES, inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ADVANTAGE = "A = log T − log S"
FEW_TOKENS = 48  # up to here every bar bears its token's text
NEAR_ZERO = 0.05  # |A| below is neither pressed down nor up
TAIL_POINTS = 100
WRONG = "#d1495b"


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn: its file name, title, size in inches, and what draws it."""

    name: str
    title: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]


def drawings(views: Sequence[TokenView], measured: int = 0) -> list[Drawing]:
    """The figures that the views have data for. measured: wrong responses that there were in all,
    said where the views are only some of them."""
    taught = [view for view in views if view.taught]
    wrong = [view for view in taught if view.first_error is not None]
    count = len(by_rollout(wrong))
    some = f" ({count} of {measured} wrong responses)" if count < measured else ""
    found = []
    if wrong:
        shown = shown_response(wrong)
        size = (9.0, 0.9 + 1.45 * len(shown))
        title = "One wrong response, token by token"
        found.append(Drawing("response", title, size, partial(_draw_response, shown)))
        title = f"Mean |A| by distance from the first wrong step{some}"
        draw = partial(_draw_profile, profiles(wrong), wrong_tokens(wrong))
        found.append(Drawing("profile", title, (9.0, 3.4), draw))
    if values := distributions(taught):
        title = f"Tokens under pressure, by place{some}"
        draw = partial(_draw_distributions, values)
        found.append(Drawing("distribution", title, (9.0, 3.4), draw))
    return found


def write_figures(run_dir: Path | str, views: Sequence[TokenView]) -> list[Path]:
    """RUN/figures/<name>.svg and .png of every figure; the paths, [] where there is no data."""
    folder, paths = Path(run_dir) / "figures", []
    for drawing in drawings(views):
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in ("svg", "png"):
            path = folder / f"{drawing.name}.{suffix}"
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(_rendered(drawing, suffix, transparent=False))
            os.replace(temporary, path)
            paths.append(path)
    return paths


def inline_figures(
    views: Sequence[TokenView], localisation: Mapping[str, Localisation] | None = None
) -> list[str]:
    """The same figures as <svg> elements that take the page's colours. localisation: of everything
    that was measured, where the views are a selection of it."""
    measured = max((one.wrong_responses for one in (localisation or {}).values()), default=0)
    return [
        inline_svg(
            _rendered(drawing, "svg", transparent=True).decode("utf-8"),
            f"advantage-{drawing.name}",
            drawing.title,
        )
        for drawing in drawings(views, measured)
    ]


def _draw_response(shown: Sequence[TokenView], figure: Figure) -> None:
    axes = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    first, tokens = shown[0], len(shown[0].spans)
    assert first.first_error is not None
    few = tokens <= FEW_TOKENS
    for ax, view in zip(axes, shown, strict=True):
        color = STYLES.get(view.context, OTHER_STYLE)[0]
        at = [index for index, where in enumerate(places(view)) if where == "at"]
        if at:
            ax.axvspan(at[0] - 0.5, at[-1] + 0.5, color=WRONG, alpha=0.16, linewidth=0)
        ax.axhline(0, color=INK, linewidth=0.6)
        if few:
            ax.bar(range(tokens), view.advantage, 0.7, color=color)
        else:
            # One path of lines to 0: a path for each token is a large SVG.
            x = [x for index in range(tokens) for x in (index, index, math.nan)]
            y = [y for advantage in view.advantage for y in (0.0, advantage, math.nan)]
            ax.plot(x, y, color=color, linewidth=1.0)
        name = printable(view.context, LABEL)
        ax.set_title(f"the teacher sees the {name}", loc="left", fontsize=9, color=INK)
        ax.margins(x=0.01, y=0.12)
        ax.grid(axis="y", alpha=0.15, color=INK)
        ax.set_axisbelow(True)
    if at := [index for index, where in enumerate(places(first)) if where == "at"]:
        middle = (at[0] + at[-1]) / 2
        place_of = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes[0].annotate("first wrong step", (middle, 1.02), color=WRONG, fontsize=9, **place_of)
    if few:
        labels = [printable(first.response[start:end], 8) or "end" for start, end in first.spans]
        axes[-1].set_xticks(range(tokens), labels, fontfamily="monospace", fontsize=9)
        axes[-1].tick_params(axis="x", length=0, rotation=0 if _narrow(labels) else 90)
    axes[-1].set_xlabel("token of the response")
    figure.supylabel(f"{ADVANTAGE}   (nats)", fontsize=10, color=INK)


def _draw_profile(
    lines: Mapping[str, tuple[list[float], list[float]]], wrong_tokens: float, figure: Figure
) -> None:
    axes = figure.subplots()
    label = "first wrong step, mean length"
    axes.axvspan(-0.5, wrong_tokens - 0.5, color=WRONG, alpha=0.16, linewidth=0, label=label)
    for index, (name, (x, values)) in enumerate(lines.items()):
        color, dash = STYLES.get(name, OTHER_STYLE)
        label, marker = printable(name, LABEL), "o" if len(x) <= BINS else None
        # The first context's dotted line stays visible on a solid one.
        style = {"color": color, "linewidth": 1.8, "marker": marker, "ms": 3, "zorder": 9 - index}
        axes.plot(x, values, dash, label=label, **style)
    axes.set_xlabel("tokens from the beginning of the first wrong step")
    axes.set_ylabel(f"mean |A|,  {ADVANTAGE}  (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.15, color=INK)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=9, borderaxespad=0.3)


def _draw_distributions(values: Mapping[str, Mapping[str, list[float]]], figure: Figure) -> None:
    """Both tails: left of 0 the share of tokens with A at most x, right of it with A at least x."""
    panels = figure.subplots(1, len(values), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (where, by_context) in zip(panels, values.items(), strict=True):
        for index, (name, advantages) in enumerate(by_context.items()):
            color, dash = STYLES.get(name, OTHER_STYLE)
            for sign, label in ((-1.0, printable(name, LABEL)), (1.0, None)):
                x, share = _tail([sign * value for value in advantages])
                style = {"color": color, "linewidth": 1.8, "zorder": 9 - index}
                axes.plot([sign * value for value in x], share, dash, label=label, **style)
        axes.set_title(PLACES[where], loc="left", fontsize=9, color=INK)
        axes.set_xscale("symlog", linthresh=NEAR_ZERO, linscale=0.25)
        ticks = [-10.0, -1.0, -0.1, 0.1, 1.0, 10.0]
        axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.grid(alpha=0.15, color=INK)
    everything = [a for one in values.values() for some in one.values() for a in some]
    panels[0].set_xlim(min(-1.5, 1.2 * min(everything)), max(1.5, 1.2 * max(everything)))
    panels[0].set_ylabel("% of tokens with A beyond x")
    panels[0].set_ylim(bottom=0)
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1.08), "borderaxespad": 0.0}
    panels[-1].legend(*panels[0].get_legend_handles_labels(), ncols=4, fontsize=9, **above)
    about = "left of 0 pressed down, A ≤ x; right of it pushed up, A ≥ x"
    figure.supxlabel(f"x in nats, {ADVANTAGE}   ({about})", fontsize=10, color=INK)


def _tail(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """(x, % of the values that are x or more) from the largest down to NEAR_ZERO."""
    ordered = sorted((v for v in values if v >= NEAR_ZERO), reverse=True)
    if not ordered:
        return [NEAR_ZERO], [0.0]
    # Each of the largest and some of the rest: a point for every token is a large SVG.
    part = [i / TAIL_POINTS for i in range(1, TAIL_POINTS + 1)]
    total = len(ordered)
    counts = sorted({*(round(total**p) for p in part), *(math.ceil(total * p) for p in part)})
    x, share = [ordered[0]], [0.0]
    for count in counts:
        x += [ordered[count - 1]] * 2
        share += [share[-1], 100 * count / len(values)]
    return [*x, NEAR_ZERO], [*share, share[-1]]


def printable(text: str, longest: int) -> str:
    """Text of the data as a label: one line, no control or direction marks, at most so long."""
    shown = (
        text.replace("\n", "↵").replace("\t", "→").replace(" ", "␣" if text.strip() == "" else " ")
    )
    shown = "".join(c if c.isprintable() else "·" for c in shown)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _narrow(labels: Sequence[str]) -> bool:
    return sum(map(len, labels)) <= 100 and max(map(len, labels)) <= 3


def _rendered(drawing: Drawing, suffix: str, *, transparent: bool) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    settings = {**SETTINGS, "svg.hashsalt": drawing.name}
    sink = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks
        figure = Figure(figsize=drawing.size, layout="constrained")
        drawing.draw(figure)
        figure.suptitle(drawing.title, x=0.01, ha="left", fontsize=11)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type")) if suffix == "svg" else {}
        figure.savefig(
            sink,
            format=suffix,
            dpi=160,
            transparent=transparent,
            facecolor="none" if transparent else "white",
            metadata=nothing,
        )
    return sink.getvalue()
