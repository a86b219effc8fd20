"""The recipe's bounds on the finished student: what `evaluate.require` demands, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_ray.errors import UserError

AT_MOST = ("kl_t1", "perplexity", "ece")
AT_LEAST = ("top1_agreement", "acceptance")
MODELS = ("teacher", "before", "after")
"""Whose figures a report states."""


def check_require(require: Mapping[str, float]) -> None:
    """Refuse a bound on a metric that does not exist, before anything is computed.

    Raises:
        UserError: unknown names, with the ones that are known.
    """
    unknown = [name for name in require if not _known(name)]
    if unknown:
        raise UserError(
            f"evaluate.require: unknown metric(s) {', '.join(unknown)}; known are {', '.join(AT_MOST)} (at most) and "
            f"{', '.join(AT_LEAST)} (at least), of the trained student, or with a prefix: after.kl_t1"
        )


def _known(name: str) -> bool:
    model, metric = _split(name)
    return model in MODELS and metric in AT_MOST + AT_LEAST


def _split(name: str) -> tuple[str, str]:
    model, dot, metric = name.rpartition(".")
    return (model if dot else "after"), metric


def judge(metrics: Mapping[str, Mapping[str, float]], require: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Hold the metrics against the bounds.

    Args:
        metrics: `teacher`, `before`, `after` → metric → value.
        require: bounds by metric; a name without a prefix means the student after training.

    Returns:
        Name as the recipe states it → `metric` (with its prefix), `sense`, `bound`, `value`, `passed`.
    """
    check_require(require)
    verdicts: dict[str, dict[str, Any]] = {}
    for name, bound in sorted(require.items()):
        model, metric = _split(name)
        value = metrics[model][metric]
        at_most = metric in AT_MOST
        verdicts[name] = {
            "metric": f"{model}.{metric}",
            "sense": "at most" if at_most else "at least",
            "bound": bound,
            "value": value,
            "passed": value <= bound if at_most else value >= bound,
        }
    return verdicts


def failures(gate: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each bound that does not hold."""
    return [
        f"{b['metric']} = {b['value']:.4g}, required {b['sense']} {b['bound']:.4g}"
        for b in gate.values()
        if not b["passed"]
    ]
