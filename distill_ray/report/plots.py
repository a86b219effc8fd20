"""The report's plots as inline SVG that takes the page's own text colour, so that light and dark both read well."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from distill_ray.report.table import MODELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"teacher": "#8b5cf6", "before": "#f59e0b", "after": "#0ea5e9"}
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_POINTS = 1000


def loss_curve(history: list[dict[str, float]]) -> str:
    """Loss, cross-entropy and KL against the step; more than 1,000 steps are averaged in blocks."""
    figure, axes = _canvas("training step", "nats per supervised token")
    block = -(-len(history) // _POINTS)
    series = (("loss", "loss", "#0ea5e9"), ("ce", "cross-entropy", "#f59e0b"), ("kl_t1", "KL at T = 1", "#8b5cf6"))
    for key, label, colour in series:
        points = [(e["step"], e[key]) for e in history if key in e]
        blocks = [points[i : i + block] for i in range(0, len(points), block)]
        steps = [sum(s for s, _ in b) / len(b) for b in blocks]
        values = [sum(v for _, v in b) / len(b) for b in blocks]
        axes.plot(steps, values, label=label, color=colour, linewidth=1.6)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _legend(axes)
    return _svg(figure, "loss")


def calibration(diagram: dict[str, dict[str, list[float]]]) -> str:
    """Reliability diagram: how often the top-1 token is right, against the probability the model gives it."""
    figure, axes = _canvas("probability of the most likely token", "share of rows where it is right")
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", label="perfect calibration")
    for model, label in MODELS:
        points, colour = diagram[model], COLOURS[model]
        axes.plot(points["confidence"], points["accuracy"], color=colour, marker="o", markersize=3.5, label=label)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    _legend(axes)
    return _svg(figure, "calibration")


def kept_mass(histogram: dict[str, list[float]]) -> str:
    """Held-out rows by the probability mass of the kept tokens."""
    figure, axes = _canvas("kept mass P of a target row", "held-out rows")
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color="#0ea5e9")
    axes.set_xlim(0, 1)
    if sum(histogram["counts"]):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=0.7)
    return _svg(figure, "kept")


def usage(rows: list[dict[str, Any]]) -> str:
    """Hours of devices by stage and node type, one bar each: starting, busy, idle."""
    figure, axes = _canvas("hours that devices were held", "")
    labels = [f"{row['stage']}, {row['node_type']}" for row in rows]
    left = [0.0] * len(rows)
    for key, label, colour in (
        ("start_s", "starting", "#f59e0b"),
        ("busy_s", "busy", "#0ea5e9"),
        ("idle_s", "idle", "#8b5cf6"),
    ):
        hours = [row[key] / 3600 for row in rows]
        axes.barh(labels, hours, left=left, height=0.6, label=label, color=colour)
        left = [a + b for a, b in zip(left, hours, strict=True)]
    axes.invert_yaxis()
    _legend(axes)
    return _svg(figure, "usage")


def _canvas(x: str, y: str) -> tuple[Figure, Axes]:
    # Figure without pyplot: no global state, no display, safe in any thread.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(which="both", colors=_INK, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _legend(axes: Axes) -> None:
    legend = axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    legend.set_zorder(3)


def _svg(figure: Figure, prefix: str) -> str:
    """SVG markup to put straight into HTML; `prefix` keeps its ids apart from the other plots'."""
    import matplotlib

    out = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text (searchable, in the page's font); a fixed salt makes equal data give equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns|xmlns:xlink)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    # Only the view box stays, so that the page's width rules.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(_INK, "currentColor")


__all__ = ["COLOURS", "calibration", "kept_mass", "loss_curve", "usage"]
