"""The recipe's bounds on the finished student: what `evaluate.require` demands, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_ray.config.bounds import MODELS, RELATIVE, Bound, key_of, known_direction, problems_of
from distill_ray.errors import UserError

_SENSE = {
    "max": "at most",
    "min": "at least",
    "max_rise": "a rise of at most",
    "max_drop": "a drop of at most",
}


@dataclass(frozen=True)
class Baseline:
    """The version that relative bounds compare with."""

    version: str
    report: Mapping[str, Any] | None
    """Its report; None where it cannot be read."""
    problem: str = ""
    """Why not."""


def check_require(require: Mapping[str, float | Bound]) -> None:
    """Refuse a bound on a figure that does not exist, before anything is computed.

    Raises:
        UserError: unknown names, with the ones that are known; a number whose direction is not known.
    """
    if problems := problems_of(require):
        raise UserError("; ".join(problems))


def judge(
    report: Mapping[str, Any], bounds: Mapping[str, Any], baseline: Baseline | None = None
) -> dict[str, dict[str, Any]]:
    """Hold a report's figures against the bounds.

    Args:
        report: its figures; at least `teacher`, `before`, `after` → metric → value.
        bounds: as `EvaluateSection.bounds` gives them, by metric; a name without a prefix means the student after
            training.
        baseline: what relative bounds compare with; None before the first version.

    Returns:
        Name as the recipe states it, with its key where there are several → `metric` (its key in the report), `sense`,
        `bound`, `value`, `passed`; `against` and `before` where it is relative. `passed` is None, and `note` says why,
        where nothing can be compared: such a bound neither holds nor fails.

    Raises:
        UserError: a number whose direction is not known, or of an unknown figure.
    """
    check_require({name: stated for name, stated in bounds.items() if not isinstance(stated, Mapping)})
    verdicts: dict[str, dict[str, Any]] = {}
    for name, stated in sorted(bounds.items()):
        wanted = stated if isinstance(stated, Mapping) else {known_direction(name): stated}
        senses = [sense for sense in _SENSE if sense in wanted]
        for sense in senses:
            label = name if len(senses) == 1 else f"{name} {sense}"
            verdict = {"metric": key_of(name), "sense": _SENSE[sense], "bound": wanted[sense]}
            verdict["value"] = _figure(report, key_of(name))
            if verdict["value"] is None:
                verdict |= _absent(key_of(name), report)
            elif sense in RELATIVE:
                verdict |= _relative(sense, verdict, report, baseline, wanted.get("on_other_holdout", "warn"))
            else:
                value, bound = verdict["value"], verdict["bound"]
                verdict["passed"] = value <= bound if sense == "max" else value >= bound
            verdicts[label] = verdict
    return verdicts


def _figure(report: Mapping[str, Any], key: str) -> float | None:
    value: Any = report
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value if isinstance(value, int | float) else None


def _absent(key: str, report: Mapping[str, Any]) -> dict[str, Any]:
    if key.startswith("drift."):
        found = report.get("drift") or {"note": "there is no earlier run to compare the corpus with"}
        return {"passed": None, "note": found["note"]}
    return {"passed": False, "note": "it was not measured in this run"}


def _relative(
    sense: str, verdict: Mapping[str, Any], report: Mapping[str, Any], baseline: Baseline | None, otherwise: str
) -> dict[str, Any]:
    if baseline is None:
        return {"passed": None, "note": "there is no latest version to compare with"}
    found: dict[str, Any] = {"against": baseline.version}
    if problem := _incomparable(str(verdict["metric"]), report, baseline):
        return found | {"passed": False if otherwise == "fail" else None, "note": problem}
    assert baseline.report is not None
    before = _figure(baseline.report, str(verdict["metric"]))
    assert before is not None
    change = verdict["value"] - before if sense == "max_rise" else before - verdict["value"]
    return found | {"before": before, "passed": change <= verdict["bound"]}


def _incomparable(key: str, report: Mapping[str, Any], baseline: Baseline) -> str:
    """Why a figure cannot be compared with the baseline's; empty where it can."""
    before = baseline.report
    if before is None:
        return f"the report of {baseline.version} cannot be read: {baseline.problem}"
    if _figure(before, key) is None:
        return f"the report of {baseline.version} does not have {key}"
    model, _, metric = key.partition(".")
    if model not in MODELS:
        return ""
    held_out, then = report.get("holdout", {}), before.get("holdout", {})
    if not held_out.get("fingerprint") or held_out["fingerprint"] != then.get("fingerprint"):
        return (
            f"{baseline.version} was scored on other held-out sequences ({then.get('sequences', 'unknown')}, here "
            f"{held_out.get('sequences', 'unknown')})"
        )
    if report["identity"]["capture"] != before["identity"]["capture"]:
        return f"{baseline.version} was scored against another capture: its teacher or settings differ"
    bins = [each["recipe"].get("evaluate", {}).get("ece_bins") for each in (report, before)]
    if metric == "ece" and bins[0] != bins[1]:
        return f"{baseline.version} has the calibration error over {bins[1]} bins, this report over {bins[0]}"
    return ""


def failures(gate: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each bound that does not hold."""
    return [_sentence(b) for b in gate.values() if b["passed"] is False]


def unjudged(gate: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each bound that could not be judged."""
    return [_sentence(b) for b in gate.values() if b["passed"] is None]


def _sentence(verdict: Mapping[str, Any]) -> str:
    value = verdict["value"]
    line = f"{verdict['metric']} = {'unknown' if value is None else f'{value:.4g}'}, required {required(verdict)}"
    return line + (f" ({verdict['note']})" if "note" in verdict else "")


def required(verdict: Mapping[str, Any]) -> str:
    """What the bound demands: `at most 0.15`, `a rise of at most 0.02 from 0.13 (2026-W47)`."""
    line = f"{verdict['sense']} {verdict['bound']:.4g}"
    if "before" in verdict:
        return f"{line} from {verdict['before']:.4g} ({verdict['against']})"
    return line + (f" from that of {verdict['against']}" if "against" in verdict else "")
