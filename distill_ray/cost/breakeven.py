"""From how many requests a day a student has paid for itself, against serving its teacher.

    requests a day = dollars of the student / (days · saving of a request)
    saving of a request = tokens of a request / 10⁶ · (teacher's − student's dollars of a million tokens)

Everything in it is stated by the recipe or was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_ray.config.cost import CostSection

DAYS_OF_MONTH = 365.25 / 12
_MILLION = 1e6


def break_even(prices: CostSection, devices: float | None, storage_month: float | None) -> dict[str, Any]:
    """`requests_per_day` with its inputs, all in dollars; without it `missing` names what is not known, or `never` says
    that no number of requests is enough.

    Args:
        prices: of the recipe.
        devices: dollars of all devices that the run held; None where a price or a usage is not known.
        storage_month: dollars a month of what it stores; None without a price, and storage is then not counted.
    """
    serving = prices.serving
    teacher, teacher_from = _million(prices, "teacher")
    student, student_from = _million(prices, "student")
    wanted = {
        "the dollars of this run": devices,
        "cost.serving.tokens_per_request": serving.tokens_per_request,
        "cost.serving.horizon_days": serving.horizon_days,
        teacher_from: teacher,
        student_from: student,
    }
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        return {"missing": missing}
    assert devices is not None
    assert serving.tokens_per_request is not None
    assert serving.horizon_days is not None
    assert teacher is not None
    assert student is not None
    stored = None if storage_month is None else storage_month * serving.horizon_days / DAYS_OF_MONTH
    saving = serving.tokens_per_request / _MILLION * (teacher - student)
    found = {
        "devices_dollars": devices,
        **({} if stored is None else {"storage_dollars": stored}),
        "horizon_days": serving.horizon_days,
        "tokens_per_request": serving.tokens_per_request,
        "teacher_million_tokens": teacher,
        "student_million_tokens": student,
        "saving_per_request": saving,
    }
    if saving <= 0:
        return found | {"never": "a request to the student costs no less than one to the teacher"}
    return found | {"requests_per_day": (devices + (stored or 0.0)) / (serving.horizon_days * saving)}


def _million(prices: CostSection, who: str) -> tuple[float | None, str]:
    """Dollars of a million tokens served, and what the recipe has to state for them."""
    dollars, hours = (getattr(prices.serving, f"{who}_{name}") for name in ("million_tokens", "gpu_hours"))
    if dollars is not None:
        return dollars, f"cost.serving.{who}_million_tokens"
    if hours is None:
        return None, f"cost.serving.{who}_million_tokens (or {who}_gpu_hours)"
    hour = getattr(prices, f"{who}_gpu_hour")
    return None if hour is None else hours * hour, f"cost.{who}_gpu_hour"


def sentence(found: Mapping[str, Any]) -> str:
    """The break-even in words, with all its inputs."""
    if "missing" in found:
        return "Against serving the teacher: not reckoned, since not stated or not known are " + ", ".join(
            found["missing"]
        )
    served = (
        f"a request of {found['tokens_per_request']:,g} tokens costs {_request(found, 'teacher')} to the teacher and "
        f"{_request(found, 'student')} to the student"
    )
    spent = f"it cost ${found['devices_dollars']:,.2f} of devices"
    if "storage_dollars" in found:
        spent += f" and ${found['storage_dollars']:,.2f} of storage for {found['horizon_days']:g} days"
    else:
        spent += ", storage not counted (cost.storage_gb_month is not stated)"
    if "never" in found:
        return f"The student never pays for itself: {found['never']}; {served}, and {spent}"
    return (
        f"From {_count(found['requests_per_day'])} requests a day on, the student has paid for itself after "
        f"{found['horizon_days']:g} days: {spent}, and {served}"
    )


def _request(found: Mapping[str, Any], who: str) -> str:
    million = found[f"{who}_million_tokens"]
    return f"${found['tokens_per_request'] / _MILLION * million:.3g} (${million:g} a million tokens)"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
