"""Dollars, by stated prices alone: where one is missing there is no figure, and no sum that it belongs to."""

from __future__ import annotations

from collections.abc import Iterable

from distill_ray.config.cost import CostSection
from distill_ray.cost.usage import Device, StageUsage

HOUR = 3600.0
TOTAL = "total"


def price_of(prices: CostSection, usage: StageUsage) -> float | None:
    """Dollars of one device for an hour; None where the recipe does not state it."""
    return device_price(prices, usage.stage, usage.device, usage.on.node_type)


def device_price(prices: CostSection, stage: str, device: Device, node_type: str | None) -> float | None:
    """The same of a stage on a type of node; None: of a type that is not known."""
    if node_type in prices.device_hour:
        return prices.device_hour[node_type]
    if device != "GPU":
        return None
    return prices.teacher_gpu_hour if stage in ("capture", "audit") else prices.student_gpu_hour


def dollars_of(prices: CostSection, usage: StageUsage) -> float | None:
    """What one stage cost on one type of node."""
    price = price_of(prices, usage)
    return None if price is None else usage.on.seconds / HOUR * price


def dollars_by_stage(prices: CostSection, usages: Iterable[StageUsage]) -> dict[str, float]:
    """Stage → dollars, and `total`; a stage without a price on one of its types of node is left out, and so is then
    the total."""
    found = dict[str, float]()
    unknown = set[str]()
    for usage in usages:
        dollars = dollars_of(prices, usage)
        if dollars is None:
            unknown.add(usage.stage)
        else:
            found[usage.stage] = found.get(usage.stage, 0.0) + dollars
    known = {stage: dollars for stage, dollars in found.items() if stage not in unknown}
    return known | ({TOTAL: sum(known.values())} if known and not unknown else {})
