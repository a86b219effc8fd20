"""report.html: one self-contained page, readable in light and dark, that fetches nothing."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from distill_ray.report import costs, plots
from distill_ray.report.gate import failures, required, unjudged
from distill_ray.report.table import METRICS, MODELS

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d4dae0; --page: #ffffff; --card: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
  --card: #151b23; --good: #3fb950; --bad: #f85149; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; }
td.hash { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: .5rem; }
figure svg { width: 100%; height: auto; display: block; } figcaption { font-size: .85rem; color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); } .wide { overflow-x: auto; }
"""


def render_html(report: dict[str, Any], history: list[dict[str, float]]) -> str:
    """The whole page.

    Args:
        report: as `build_report` gives it.
        history: training steps, for the loss curve.
    """
    identity = report["identity"]
    title = f"{identity['name']} {identity['version']}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        '<p class="soft">Distillation report: what the student learned and what it cost.</p>',
        _gate(report["gate"]),
        "<h2>Teacher and student on held-out text</h2>",
        _metrics_table(report),
        "<h2>Plots</h2>",
        _plots(report, history),
        "<h2>Usage and cost</h2>",
        costs.section(report.get("cost")),
        "<h2>Speed and amounts</h2>",
        _amounts(report),
        "<h2>Audit of the targets before training</h2>",
        _audit(report.get("audit")),
        "<h2>Drift of the corpus</h2>",
        _drift(report.get("drift")),
        "<h2>Identity</h2>",
        _table(((key, value) for key, value in identity.items()), value_class="hash"),
        "<h2>How the figures are defined</h2>",
        _table(report["definitions"].items()),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – distillation report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _gate(gate: dict[str, Any]) -> str:
    if not gate:
        return '<p class="soft">The recipe sets no bounds (evaluate.require), so nothing was gated.</p>'
    rows = "".join(
        f"<tr><td>{escape(b['metric'])}</td><td class=number>{_value(b['value'])}</td>"
        f"<td class=number>{escape(required(b))}</td>{_verdict(b)}</tr>"
        for b in gate.values()
    )
    passed = not failures(gate)
    held = "All bounds hold." if not unjudged(gate) else "No bound fails, but not every one could be judged."
    verdict = held if passed else "A bound fails: the model is kept, latest does not move."
    return (
        f'<h2>Gate</h2><p class="{"good" if passed else "bad"}">{verdict}</p><table><tr><th>Metric</th>'
        f"<th class=number>Value</th><th class=number>Required</th><th>Verdict</th></tr>{rows}</table>"
    )


def _value(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _verdict(bound: dict[str, Any]) -> str:
    kind, text = {True: ("good", "passed"), False: ("bad", "failed"), None: ("soft", "not judged")}[bound["passed"]]
    return f'<td class="{kind}">{text}{escape(": " + bound["note"]) if "note" in bound else ""}</td>'


def _metrics_table(report: dict[str, Any]) -> str:
    head = "".join(f"<th class=number>{name.capitalize()}</th>" for _, name in MODELS)
    rows = "".join(
        f"<tr><td>{label}</td>" + "".join(f"<td class=number>{report[m][key]:{spec}}</td>" for m, _ in MODELS) + "</tr>"
        for key, label, spec in METRICS
    )
    return f"<div class=wide><table><tr><th>Metric</th>{head}</tr>{rows}</table></div>"


def _plots(report: dict[str, Any], history: list[dict[str, float]]) -> str:
    shown = [
        ("Reliability: on the dotted line a probability means what it says.", plots.calibration(report["calibration"])),
        (
            "Kept mass of the held-out target rows; the rest is in the tail bucket.",
            plots.kept_mass(report["kept_mass"]),
        ),
    ]
    if history:
        shown.insert(0, ("Training loss and its parts.", plots.loss_curve(history)))
    figures = (f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for caption, svg in shown)
    return f"<div class=plots>{''.join(figures)}</div>"


def _amounts(report: dict[str, Any]) -> str:
    timings, tokens, targets = report["timings"], report["tokens"], report["targets"]
    rows = [(f"Seconds, {stage}", f"{value:,.1f}") for stage, value in timings["seconds"].items()]
    rows += [(f"Tokens/s, {stage}", _rate(report, stage)) for stage in ("teacher", "train", "evaluate")]
    rows += [
        ("Tokens captured for this run", f"{tokens['captured']:,}"),
        ("Tokens reused from earlier captures", f"{tokens['reused']:,}"),
        ("Supervised tokens trained on", f"{tokens['supervised_train']:,}"),
        ("Supervised held-out tokens", f"{tokens['held_out']:,}"),
        ("Target rows", f"{targets['rows']:,}"),
        ("Bytes per target row", f"{targets['bytes_per_row']:.1f}"),
        ("Mean kept mass", f"{targets['mean_kept_mass']:.4f}"),
        ("Dead letters", f"{targets['dead_letters']:,}"),
    ]
    if targets["documents"] is not None:
        rows.append(("Documents of the corpus", f"{targets['documents']:,}"))
    rows += [(f"Refused: {reason}", f"{count:,}") for reason, count in targets["refused"].items()]
    return _table(rows, value_class="number")


def _rate(report: dict[str, Any], stage: str) -> str:
    timings, units = report["timings"], report["identity"]["units"]
    value = timings["tokens_per_s"].get(stage)
    untimed = timings["untimed_units"] if stage == "teacher" else 0
    return ("not measured" if value is None else f"{value:,.0f}") + (
        f" (capture time of {untimed:,} of {units:,} units not known)" if untimed else ""
    )


def _audit(audit: dict[str, Any] | None) -> str:
    if audit is None:
        return '<p class="soft">The student was trained on targets that no audit compared with the teacher.</p>'
    tolerance = audit["tolerance"]
    rows = [
        ("Scored again by", f"{audit['path']}, {audit['dtype']}"),
        ("Sample", f"{audit['sequences']:,} sequences of {audit['units']:,} units, {audit['rows']:,} rows"),
        ("Largest |Δ log p| beyond the codec's rounding", f"{audit['worst_nats']:.1e} nats"),
        ("Allowed", f"{tolerance['logprob']:g} nats, {tolerance['row_mass']:g} of a row's probability mass"),
    ]
    return _table(rows)


def _drift(drift: dict[str, Any] | None) -> str:
    if drift is None:
        return '<p class="soft">There is no earlier run to compare the corpus with.</p>'
    js, chance, delta = (drift[f"held_out_{name}"] for name in ("token_js", "token_js_by_chance", "entropy_delta"))
    rows = [("Compared with", drift["against"])]
    if js is not None:
        rows.append(("Token frequencies of held-out text, divergence", f"{js:.4f} nats ({chance:.4f} would be chance)"))
    if delta is not None:
        rows.append(("Teacher's entropy on held-out text, change", f"{delta:+.4f} nats"))
    note = f'<p class="soft">{escape(drift["note"])}.</p>' if drift["note"] else ""
    warning = drift.get("warning")
    return _table(rows) + note + (f'<p class="bad">{escape(warning)}.</p>' if warning else "")


def _table(rows: Iterable[tuple[str, Any]], value_class: str = "") -> str:
    cells = (
        f'<tr><td>{escape(str(key).replace("_", " "))}</td><td class="{value_class}">{escape(str(value))}</td></tr>'
        for key, value in rows
    )
    return f"<table>{''.join(cells)}</table>"
