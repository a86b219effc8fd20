"""The figures as plain text: the last lines that a run prints."""

from __future__ import annotations

from typing import Any

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
    """Teacher, student before and student after, one metric a line, columns aligned."""
    rows = [("held-out text", *(name for _, name in MODELS))]
    rows += [(label, *(f"{report[model][key]:{spec}}" for model, _ in MODELS)) for key, label, spec in METRICS]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
