"""What a run will take, before it runs: tokens by rates, hours by prices, rows by bytes; and that beside what it was.

    device hours = devices of a process · (tokens / its tokens a second + processes · seconds of a start) / 3600

Rates are stated by the recipe or were measured; without one there are no hours, and without a price no dollars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from distill_ray.config import Recipe
from distill_ray.cost.meter import held
from distill_ray.cost.prices import HOUR, device_price
from distill_ray.cost.usage import Device
from distill_ray.schema import Amounts

FORECAST = "forecast"
"""Name under which a run publishes its forecast before it begins."""
_GB = 1e9
Row = tuple[str, float | None, float | None]
"""What it is, as forecast, as it was."""


@dataclass(frozen=True)
class Rate:
    """How fast one process of a stage is."""

    tokens_s: float
    """Tokens a second while it is ready, its waits included."""
    start_s: float | None
    """Seconds until it is ready; None where they are not stated: starts are then left out."""
    origin: str
    """`stated`, or the version that measured it."""
    node_type: str | None = None
    """On which it was measured; None where it was stated."""


@dataclass(frozen=True)
class StageForecast:
    """One stage."""

    stage: str
    tokens: int
    """All tokens that it works on."""
    supervised: int
    """Those of them that it is supervised on."""
    device: Device
    processes: int
    """That run at once: of teachers as many as the backlog is worth, of workers all."""
    rate: Rate | None
    """None: neither stated nor measured, as `missing` says."""
    device_hours: float | None
    wall_hours: float | None
    """With all processes from the beginning to the end."""
    dollars: float | None
    missing: str
    """Why there are no hours; empty where there are."""


@dataclass(frozen=True)
class StoredForecast:
    """Bytes that the run will keep; None where they are not reckoned."""

    targets: int
    """Target objects written by it; those it reuses are there already."""
    run: int | None
    """Its own folder: checkpoints kept at the end, and the student."""
    model: int | None
    """Its exported folder."""
    dollars_month: float | None = None
    """Of all three; None without a price, or where one is not reckoned."""


@dataclass(frozen=True)
class Basis:
    """What the amounts rest on."""

    sources: int
    bytes: int
    """Stored bytes of all sources."""
    sampled_sources: int
    sampled_bytes: int
    """Uncompressed bytes of the records that were tokenised for it."""
    captured_tokens: int
    """Tokens of units that are captured already, counted exactly."""
    upper_bound: bool
    """The teacher writes completions: reckoned as if each were as long as allowed."""
    notes: tuple[str, ...] = ()
    """What could not be told."""


@dataclass(frozen=True)
class Forecast:
    """Of one run, as of before it began. Audit, evaluation and export are not in it."""

    stages: tuple[StageForecast, ...]
    rows: int
    """Target rows to be captured."""
    stored: StoredForecast
    basis: Basis

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as the run keeps them."""
        return asdict(self) | {"stages": [asdict(each) for each in self.stages]}


def stage_forecast(
    recipe: Recipe, stage: str, tokens: float, supervised: float, rate: Rate | str, processes: int
) -> StageForecast:
    """Hours and dollars of one stage.

    Args:
        recipe: devices and prices.
        stage: "capture" or "train".
        tokens: that it works on.
        supervised: those of them that it is supervised on.
        rate: of one process, or why there is none.
        processes: that run at once, each of which starts once.
    """
    holds = held(recipe, stage)
    found = StageForecast(
        stage, round(tokens), round(supervised), holds.device, processes, None, None, None, None, str(rate)
    )
    if isinstance(rate, str):
        return found
    start, works = (rate.start_s or 0.0) if tokens else 0.0, tokens / rate.tokens_s
    hours = (works + processes * start) * holds.count / HOUR
    price = device_price(recipe.cost, stage, holds.device, rate.node_type)
    return replace(
        found,
        rate=rate,
        device_hours=hours,
        wall_hours=(works / processes + start) / HOUR,
        dollars=None if price is None else hours * price,
        missing="",
    )


def stored_forecast(
    recipe: Recipe, new: Amounts, row_bytes: float, train_tokens: float, weights: int | None
) -> StoredForecast:
    """Bytes kept at the end of the run.

    A checkpoint holds float32 weights and Adam's two moments, 12 bytes a parameter, and the weights that train, 2 bytes
    in bf16 and 4 in fp32.

    Args:
        recipe: precision, checkpoints, type of the export, price.
        new: what is captured.
        row_bytes: of one target row, its share of token and mask included.
        train_tokens: of all epochs, which say how many checkpoints there are.
        weights: parameters of the student, all of them trained; None: not known.
    """
    train, targets = recipe.train, round(new.rows * row_bytes)
    if weights is None:
        return StoredForecast(targets, None, None)
    working = 2 if train.precision == "bf16" else 4
    steps = -(-int(train_tokens) // train.global_batch_tokens)
    # The best one is kept beside the newest; most often it is one of them.
    made = max(0, steps - 1) // train.checkpoint_every
    kept = min(made, train.keep_checkpoints + (made // train.keep_every if train.keep_every else 0))
    run = kept * (12 + working) * weights + working * weights
    model = weights * (4 if recipe.export.dtype == "float32" else 2)
    price = recipe.cost.storage_gb_month
    month = None if price is None else (targets + run + model) / _GB * price
    return StoredForecast(targets, run, model, month)


def forecast_sentence(found: Forecast) -> str:
    """The forecast in words, for a terminal."""
    most = "at most " if found.basis.upper_bound else ""
    parts = [_stage_sentence(each, most) for each in found.stages]
    stored = found.stored
    sizes = [f"{_size(stored.targets)} of targets"]
    sizes += [f"{_size(size)} of {name}" for name, size in (("run", stored.run), ("model", stored.model)) if size]
    month = "" if stored.dollars_month is None else f", ${stored.dollars_month:,.2f} a month"
    basis = found.basis
    parts.append(f"stores {most}{', '.join(sizes)}{month}, for {found.rows:,} target rows")
    parts.append(
        f"from {basis.sampled_bytes:,} bytes of {basis.sampled_sources:,} of {basis.sources:,} source(s), "
        f"{basis.bytes:,} bytes, and {basis.captured_tokens:,} tokens captured already"
    )
    return "; ".join([*parts, "audit, evaluation and export not counted", *basis.notes])


def _stage_sentence(each: StageForecast, most: str) -> str:
    what = f"{each.stage} {most}{each.tokens:,} tokens"
    if each.rate is None or each.device_hours is None or each.wall_hours is None:
        return f"{what}: no hours, {each.missing}"
    unit = "GPU-hours" if each.device == "GPU" else "process hours"
    starts = "" if each.rate.start_s is not None else ", starts not counted"
    dollars = "no price" if each.dollars is None else f"${each.dollars:,.2f}"
    return (
        f"{what}: {each.device_hours:,.3g} {unit}, {dollars}, {each.wall_hours:,.3g} h with {each.processes} "
        f"process(es) ({each.rate.tokens_s:,.4g} tokens/s each, {each.rate.origin}{starts})"
    )


def compared(cost: Mapping[str, Any]) -> list[Row]:
    """Forecast beside what it was, of a report's `cost` that holds a forecast; hours and seconds of all commands.

    A training's tokens are its supervised ones, which its usage counts.
    """
    rows = list[Row]()
    for each in cost["forecast"]["stages"]:
        stage = each["stage"]
        used = [usage for usage in cost["usage"] if usage["stage"] == stage]
        hours = sum(usage[name] for usage in used for name in ("start_s", "busy_s", "idle_s")) / HOUR
        counted, kind = ("supervised", "supervised tokens") if stage == "train" else ("tokens", "tokens")
        known = bool(used) or not each[counted]
        rows += [
            (f"{stage}, {kind}", each[counted], sum(usage["tokens"] for usage in used) if known else None),
            (f"{stage}, device hours", each["device_hours"], hours if known else None),
            (f"{stage}, dollars", each["dollars"], cost["dollars"].get(stage)),
        ]
    stored, was = cost["forecast"]["stored"], cost["storage"]
    rows.append(("stored in the run's own folder, bytes", stored["run"], was["run_bytes"]))
    if not cost["forecast"]["basis"]["captured_tokens"]:  # else other runs' targets are among those it uses
        rows.append(("stored targets, bytes", stored["targets"], was["targets_bytes"]))
    return rows


def _size(size: float) -> str:
    return f"{size / _GB:,.3g} GB"
