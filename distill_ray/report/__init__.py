"""report.json, report.html and the model card: what a run cost and how good its student is."""

from distill_ray.report.card import model_card
from distill_ray.report.document import (
    SCHEMA_VERSION,
    Evaluation,
    RunIdentity,
    TargetFigures,
    Timings,
    TokenCounts,
    build_report,
    read_history,
    to_bytes,
)
from distill_ray.report.drift import HeldOutSketch, corpus_drift, drift_warning, unknown_drift
from distill_ray.report.files import page_damage, read_report, report_key, write_report
from distill_ray.report.gate import MODELS, Baseline, check_require, failures, judge, unjudged
from distill_ray.report.html import render_html
from distill_ray.report.metrics import (
    DEFINITIONS,
    KeptMassHistogram,
    MetricSums,
    ScoredRows,
)
from distill_ray.report.table import render_table

__all__ = [
    "DEFINITIONS",
    "MODELS",
    "SCHEMA_VERSION",
    "Baseline",
    "Evaluation",
    "HeldOutSketch",
    "KeptMassHistogram",
    "MetricSums",
    "RunIdentity",
    "ScoredRows",
    "TargetFigures",
    "Timings",
    "TokenCounts",
    "build_report",
    "check_require",
    "corpus_drift",
    "drift_warning",
    "failures",
    "judge",
    "model_card",
    "page_damage",
    "read_history",
    "read_report",
    "render_html",
    "render_table",
    "report_key",
    "to_bytes",
    "unjudged",
    "unknown_drift",
    "write_report",
]
