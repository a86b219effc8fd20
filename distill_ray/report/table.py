"""The figures as plain text: the last lines that a run prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_ray import cost

# Name in the report, label for people, format.
METRICS = (
    ("perplexity", "Perplexity", ".3f"),
    ("kl_t1", "KL to the teacher, T = 1 (nats)", ".4f"),
    ("top1_agreement", "Top-1 agreement", ".4f"),
    ("ece", "Calibration error (ECE)", ".4f"),
    ("acceptance", "Speculative acceptance (kept + bucket)", ".4f"),
    ("rows", "Supervised held-out rows", ",.0f"),
)
MODELS = (("teacher", "teacher"), ("before", "student before"), ("after", "student after"))


def render_table(report: dict[str, Any]) -> str:
    """Teacher, student before and student after, one metric a line, columns aligned; then what was spent."""
    rows = [("held-out text", *(name for _, name in MODELS))]
    rows += [(label, *(f"{report[model][key]:{spec}}" for model, _ in MODELS)) for key, label, spec in METRICS]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([*table, *_spent(report.get("cost"))])


def _spent(found: Mapping[str, Any] | None) -> list[str]:
    """What was spent, a line each, as far as it is known."""
    if found is None or not found["usage"]:
        return []
    kinds = (("gpu_hours", "GPU-hours"), ("cpu_process_hours", "process hours on CPUs"))
    spent = ", ".join(f"{found[key]:,.3g} {name}" for key, name in kinds if found[key])
    total = found["dollars"].get(cost.TOTAL)
    lines = [f"used    {spent} in {found['commands']} command(s)" + ("" if total is None else f", ${total:,.2f}")]
    if "missing" not in found["break_even"]:
        lines.append(f"pays    {cost.sentence(found['break_even'])}")
    return lines
