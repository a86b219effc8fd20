"""Bounds on a report's figures: which figures there are, and what a recipe may demand of one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from distill_ray.config.kinds import Placement, Section

AT_MOST = ("kl_t1", "perplexity", "ece")
AT_LEAST = ("top1_agreement", "acceptance")
MODELS = ("teacher", "before", "after")
"""Whose figures a report states."""

_STEP = (
    *("step", "loss", "kl_t", "kl_t1", "ce", "kept_mass", "top1_agreement", "lr", "grad_norm", "tokens"),
    *("seconds", "data_s", "save_s", "skipped", "batch_id", "time", "workers", "input_tokens", "tokens_per_s"),
    *("host_peak_bytes", "cuda_peak_bytes", "mfu"),
)
KEYS = frozenset(
    f"{section}.{name}"
    for section, names in {
        **dict.fromkeys(MODELS, (*AT_MOST, *AT_LEAST, "rows")),
        "identity": ("units",),
        "timings": ("untimed_units",),
        "timings.seconds": ("capture", "audit", "train", "evaluate"),
        "timings.tokens_per_s": ("teacher", "train", "evaluate"),
        "tokens": ("captured", "reused", "supervised_train", "held_out"),
        "targets": ("rows", "bytes_per_row", "mean_kept_mass", "dead_letters", "documents"),
        "audit": ("units", "sequences", "rows", "worst_nats"),
        "audit.tolerance": ("logprob", "row_mass", "mean_mass"),
        "training": ("steps",),
        "training.first": _STEP,
        "training.last": _STEP,
        "holdout": ("sequences",),
        "cost": ("commands", "gpu_hours", "cpu_process_hours", "dollars_per_million_teacher_tokens"),
        "cost.dollars": ("capture", "audit", "train", "evaluate", "total"),
        "cost.storage": ("targets_bytes", "run_bytes", "model_bytes", "dollars_per_month"),
        "cost.targets": ("teacher_seconds", "device_hours", "untimed_units", "dollars"),
        "cost.break_even": (
            *("requests_per_day", "devices_dollars", "storage_dollars", "horizon_days", "tokens_per_request"),
            *("teacher_million_tokens", "student_million_tokens", "saving_per_request"),
        ),
        "drift": ("held_out_token_js", "held_out_token_js_by_chance", "held_out_entropy_delta"),
    }.items()
    for name in names
)
"""Dotted names of the numbers in report.json; a test holds them against a whole report."""

RELATIVE = frozenset({"max_rise", "max_drop"})
"""Keys of a `Bound` that compare with the latest version."""


class Bound(Section):
    """What one figure must keep to; every stated key must hold."""

    max: Placement[float | None] = None
    """At most this."""
    min: Placement[float | None] = None
    """At least this."""
    max_rise: Placement[float | None] = Field(default=None, ge=0)
    """At most so much above the same figure of the version that `latest.json` names."""
    max_drop: Placement[float | None] = Field(default=None, ge=0)
    """At most so much below it."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.stated():
            raise ValueError("states no bound; use max, min, max_rise or max_drop")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"min={self.min} is greater than max={self.max}: no figure can keep both")
        return self

    def stated(self) -> dict[str, float]:
        """The stated keys."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


Required = Annotated[
    Annotated[float, Tag("[number]")] | Annotated[Bound, Tag("[table]")],
    Discriminator(lambda value: "[table]" if isinstance(value, dict | Bound) else "[number]"),
]
"""A number for a metric whose direction is known, else a `Bound`. Tags in brackets are left out of messages."""


def flattened(require: Any, prefix: str = "") -> Any:
    """`after.kl_t1 = 0.15` is a table in a table to TOML; here it is one dotted name, as if it were quoted."""
    if not isinstance(require, Mapping):
        return require
    found: dict[Any, Any] = {}
    for name, value in require.items():
        nested = isinstance(value, Mapping) and value and not value.keys() & set(Bound.model_fields)
        found |= flattened(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def key_of(name: str) -> str:
    """The key in the report that a name of `evaluate.require` means: without a prefix, the trained student's."""
    return name if "." in name else f"after.{name}"


def known_direction(name: str) -> str | None:
    """`max` or `min` for a metric that only gets worse in one direction; None where the recipe must say it."""
    model, _, metric = key_of(name).rpartition(".")
    if model not in MODELS:
        return None
    return "max" if metric in AT_MOST else "min" if metric in AT_LEAST else None


def problems_of(require: Mapping[str, float | Bound]) -> list[str]:
    """What is wrong with the names of `evaluate.require`, one sentence each."""
    unknown = [name for name in require if key_of(name) not in KEYS]
    problems = []
    if unknown:
        near = {m for name in unknown for m in difflib.get_close_matches(key_of(name), KEYS, n=2)}
        problems.append(
            f"evaluate.require: unknown metric(s) {', '.join(unknown)}; known are {', '.join(AT_MOST)} (at most) and "
            f"{', '.join(AT_LEAST)} (at least), of the trained student, or with a prefix: after.kl_t1; and, with a "
            "direction, every number of report.json by its dotted name"
            + (f". Near: {', '.join(sorted(near))}" if near else "")
        )
    for name, bound in require.items():
        if name not in unknown and not isinstance(bound, Bound) and known_direction(name) is None:
            problems.append(
                f"evaluate.require: {name} = {bound:g} does not say whether more is better; write "
                f'"{name}" = {{ max = {bound:g} }} or {{ min = {bound:g} }}'
            )
    return problems
