"""The report's `cost`: what a run spent over all its commands, what it stores, and when it has paid for itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distill_ray.config import Recipe
from distill_ray.cost.breakeven import break_even
from distill_ray.cost.meter import held
from distill_ray.cost.prices import HOUR, TOTAL, dollars_by_stage, dollars_of, price_of
from distill_ray.cost.usage import Usage, by_stage, device_hours

_MILLION = 1e6
_GB = 1e9


@dataclass(frozen=True)
class Stored:
    """Bytes that the run keeps."""

    targets: int
    """Target objects that it uses, which other runs may use too."""
    run: int
    """Its own folder: checkpoints, student, reports."""
    model: int
    """Its exported folders."""


@dataclass(frozen=True)
class TargetsTime:
    """What the run's targets took to capture, whichever run did it."""

    teacher_seconds: float
    """Of one replica, summed over units."""
    untimed_units: int
    """Units of which the seconds are not known."""


def account(
    recipe: Recipe,
    usages: list[Usage],
    *,
    problems: Iterable[str] = (),
    unknown: Iterable[str] = (),
    stored: Stored,
    targets: TargetsTime,
) -> dict[str, Any]:
    """`cost` as plain JSON values; dollars only where every price that they need is stated.

    Args:
        recipe: with its prices.
        usages: of all commands of the run.
        problems: why some could not be read.
        unknown: stages that the run did and of which there is no usage.
        stored: what lies in storage.
        targets: what the targets took.
    """
    prices, stages = recipe.cost, by_stage(usages)
    notes = [*problems, *(f"what {stage} spent is not known" for stage in unknown)]
    dollars = dollars_by_stage(prices, stages)
    if notes:
        dollars.pop(TOTAL, None)
    found: dict[str, Any] = {
        "commands": len({u.epoch for u in usages}),
        "gpu_hours": device_hours(usages, "GPU"),
        "cpu_process_hours": device_hours(usages, "CPU process"),
        "usage": [
            {
                "stage": each.stage,
                "node_type": each.on.node_type,
                "device": each.device,
                "commands": each.commands,
                "processes": each.on.processes,
                "start_s": each.on.start_s,
                "busy_s": each.on.busy_s,
                "idle_s": each.on.idle_s,
                "done": each.on.done,
                "tokens": each.on.tokens,
                "device_hour": price_of(prices, each),
                "dollars": dollars_of(prices, each),
            }
            for each in stages
        ],
        "dollars": dollars,
        "storage": _storage(recipe, stored),
        "targets": _targets(recipe, targets),
        "notes": notes,
    }
    taught = sum(each.on.tokens for each in stages if each.stage == "capture")
    if taught and "capture" in dollars:
        found["dollars_per_million_teacher_tokens"] = dollars["capture"] / (taught / _MILLION)
    month = found["storage"].get("dollars_per_month")
    return found | {"break_even": break_even(prices, dollars.get(TOTAL), month)}


def measured(found: Mapping[str, Any]) -> tuple[Stored, TargetsTime]:
    """What a report's `cost` was made from beside prices and usage."""
    stored, targets = found["storage"], found["targets"]
    return (
        Stored(stored["targets_bytes"], stored["run_bytes"], stored["model_bytes"]),
        TargetsTime(targets["teacher_seconds"], targets["untimed_units"]),
    )


def _storage(recipe: Recipe, stored: Stored) -> dict[str, Any]:
    found: dict[str, Any] = {
        "targets_bytes": stored.targets,
        "run_bytes": stored.run,
        "model_bytes": stored.model,
    }
    price = recipe.cost.storage_gb_month
    if price is not None:
        found["dollars_per_month"] = (stored.targets + stored.run + stored.model) / _GB * price
    return found


def _targets(recipe: Recipe, targets: TargetsTime) -> dict[str, Any]:
    holds, price = held(recipe, "capture"), recipe.cost.teacher_gpu_hour
    hours = targets.teacher_seconds * holds.count / HOUR
    found: dict[str, Any] = {
        "teacher_seconds": targets.teacher_seconds,
        "device_hours": hours,
        "untimed_units": targets.untimed_units,
    }
    # The index does not say on what nodes an earlier run's teachers ran, only how long.
    if holds.device == "GPU" and price is not None and not targets.untimed_units:
        found["dollars"] = hours * price
    return found
