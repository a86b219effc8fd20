"""Usage and cost, on the page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from distill_ray import cost
from distill_ray.report import plots

_HOUR = 3600.0
_GB = 1e9
_CAPTION = "Hours that devices were held, over all commands of the run."


def section(found: Mapping[str, Any] | None) -> str:
    """HTML of the report's `cost`."""
    if found is None:
        return '<p class="soft">What the run used is not known.</p>'
    parts = [_usage_table(found["usage"], found["dollars"]), f"<p>{escape(cost.sentence(found['break_even']))}.</p>"]
    if found["usage"]:
        figure = f"<figure>{plots.usage(found['usage'])}<figcaption>{_CAPTION}</figcaption></figure>"
        parts.insert(1, f"<div class=plots>{figure}</div>")
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class=number>{escape(value)}</td></tr>" for name, value in _facts(found)
    )
    notes = "".join(f'<p class="bad">Not in these figures: {escape(note)}.</p>' for note in found["notes"])
    return "".join([*parts, f"<table>{rows}</table>", notes, _forecast(found)])


def _forecast(found: Mapping[str, Any]) -> str:
    """The forecast beside what it was; runs begun by older software have none."""
    about = found.get(cost.FORECAST)
    if about is None:
        return '<p class="soft">No forecast was made before this run began.</p>'
    head = "".join(f"<th class=number>{name}</th>" for name in ("Before the run", "It was", "Ratio"))
    rows = "".join(
        f"<tr><td>{escape(name.capitalize())}</td>"
        f"{''.join(f'<td class=number>{_figure(value)}</td>' for value in (before, was))}"
        f"<td class=number>{f'{was / before:.2f}' if before and was is not None else '–'}</td></tr>"
        for name, before, was in cost.compared(found)
    )
    basis = about["basis"]
    said = [each["missing"] for each in about["stages"] if each["missing"]] + list(basis["notes"])
    said += ["the teacher's completions count as long as they may be"] if basis["upper_bound"] else []
    origins = [f"{each['stage']}: {each['rate']['origin']}" for each in about["stages"] if each["rate"]]
    notes = "; ".join([*(f"rate of {origin}" for origin in origins), *said])
    return f"<table><tr><th>Forecast</th>{head}</tr>{rows}</table>" + (
        f'<p class="soft">{escape(notes)}.</p>' if notes else ""
    )


def _figure(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _usage_table(usage: list[Mapping[str, Any]], dollars: Mapping[str, float]) -> str:
    names = ("Stage", "Node type", "Devices", "Commands", "Starting", "Busy", "Idle", "Hours held", "$ an hour", "$")
    head = "".join(f"<th{' class=number' if i > 2 else ''}>{name}</th>" for i, name in enumerate(names))
    rows = "".join(f"<tr>{''.join(_cells(each))}</tr>" for each in usage)
    total = _money(dollars.get(cost.TOTAL))
    last = f'<tr><th colspan="9">One student, all stages</th><th class=number>{total}</th></tr>'
    return f"<div class=wide><table><tr>{head}</tr>{rows}{last}</table></div>"


def _cells(each: Mapping[str, Any]) -> list[str]:
    seconds = [each[name] for name in ("start_s", "busy_s", "idle_s")]
    held = sum(seconds)
    # The share says how well devices were used, and is what people compare between weeks.
    shares = [f"{s:,.0f} s ({s / held:.0%})" if held else "0 s" for s in seconds]
    texts = [each["stage"], each["node_type"], f"{each['device']}s, {each['processes']:,} process(es)"]
    numbers = [str(each["commands"]), *shares, f"{held / _HOUR:,.3f}"]
    numbers += [_money(each["device_hour"]), _money(each["dollars"])]
    return [f"<td>{escape(t)}</td>" for t in texts] + [f"<td class=number>{n}</td>" for n in numbers]


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    stored, targets = found["storage"], found["targets"]
    rows = [
        ("Dollars a million teacher tokens", _money(found.get("dollars_per_million_teacher_tokens"), 4)),
        ("Dollars of this student, all commands", _money(found["dollars"].get(cost.TOTAL))),
        ("GPU-hours", f"{found['gpu_hours']:,.3f}"),
        ("Process hours on CPUs", f"{found['cpu_process_hours']:,.3f}"),
        ("Stored targets, which other runs may share", _size(stored["targets_bytes"])),
        ("Stored in the run's own folder", _size(stored["run_bytes"])),
        ("Stored as exported models", _size(stored["model_bytes"])),
        ("Storage, dollars a month", _money(stored.get("dollars_per_month"))),
    ]
    took = f"{targets['device_hours']:,.3f}"
    if targets["untimed_units"]:
        took += f", without {targets['untimed_units']:,} units whose time is not known"
    if "dollars" in targets:
        took += f", {_money(targets['dollars'])}"
    return [*rows, ("Device hours that all targets of this run took, in whichever run they were captured", took)]


def _money(value: float | None, digits: int = 2) -> str:
    return "no price" if value is None else f"${value:,.{digits}f}"


def _size(size: float) -> str:
    return f"{size / _GB:,.3f} GB"
