"""The report's figures as inline SVG.

matplotlib is imported on first use only. Text stays text (selectable, small, escaped by matplotlib;
`$` is not mathematics here), axes and labels take the page's own colour so that one picture serves
light and dark, and ids are prefixed so that several figures can stand in one page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from html import escape
from typing import Any

# Colours that hold on white and on near-black; the line style carries the same information.
STYLES = {
    "grpo": ("#a56eff", "--"),
    "reference": ("#e08a00", ":"),
    "critique": ("#1f8fd6", "-"),
}
OTHER_STYLE = ("#3aa655", "-.")
LABEL = 32  # characters of a name that fit a legend
INK = "#010203"  # stands for the page's text colour; replaced by currentColor

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def bars(name: str, title: str, groups: Mapping[str, Mapping[str, float | None]], unit: str) -> str:
    """One panel of grouped bars: context -> {place: value}; every bar bears its number."""

    def draw(axes: Any) -> None:
        places = list(next(iter(groups.values())))
        width = 0.8 / len(groups)
        for index, (context, values) in enumerate(groups.items()):
            color = STYLES.get(context, OTHER_STYLE)[0]
            at = [x + width * (index - (len(groups) - 1) / 2) for x in range(len(places))]
            heights = [values[place] or 0.0 for place in places]
            drawn = axes.bar(at, heights, 0.92 * width, color=color, label=context[:LABEL])
            labels = ["–" if values[p] is None else f"{values[p]:.3f}" for p in places]
            axes.bar_label(drawn, labels, padding=2, fontsize=8, color=INK)
        axes.set_xticks(range(len(places)), places)
        axes.set_ylabel(unit)
        axes.margins(y=0.12)
        axes.legend()

    return figure(name, title, draw)


def figure(name: str, title: str, draw: Any) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # Figure without pyplot: no backend, no global state
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left", fontsize=11)
        sink = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=nothing)
    return inline_svg(sink.getvalue(), name, title)


def inline_svg(svg: str, name: str, title: str) -> str:
    """The <svg> element alone: own ids, the page's colour, a label for screen readers."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
