"""report.json: what a run cost and how good its student is, in one document with a stated schema."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distill_ray.errors import IntegrityError
from distill_ray.report.drift import DEFINITIONS as DRIFT_DEFINITIONS
from distill_ray.report.drift import HeldOutSketch
from distill_ray.report.gate import Baseline, judge
from distill_ray.report.metrics import DEFINITIONS, KeptMassHistogram, MetricSums

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class RunIdentity:
    """What was computed, by fingerprint."""

    name: str
    version: str
    capture: str
    """Capture fingerprint: teacher weights, arithmetic, k, temperatures, codec."""
    units: int
    """Corpus units that the run uses."""
    corpus: str
    """Fingerprint over unit hashes and multiplicities."""
    teacher: str
    """The teacher's weights identity."""
    tokenizer: str
    student: str
    """Fingerprint of the trained weights' manifest."""
    recipe: str
    """Fingerprint of the report's `recipe`: the recipe's identity fields, [export] left out."""
    start: str = ""
    """What the student was before training, without its location."""
    start_weights: str = ""
    """Its weights identity; empty where they are drawn from a seed, or the run's record does not say."""


@dataclass(frozen=True)
class TokenCounts:
    captured: int
    """Tokens that the teacher scored for this run."""
    reused: int
    """Tokens of units captured by an earlier run or command."""
    supervised_train: int
    """Supervised tokens trained on, over all epochs."""
    held_out: int
    """Supervised held-out tokens that the figures rest on."""


@dataclass(frozen=True)
class TargetFigures:
    rows: int
    bytes_per_row: float
    """Object bytes by target rows, token ids and footers included."""
    mean_kept_mass: float
    dead_letters: int
    """Documents and sequences that failed for their own reasons."""
    documents: int | None
    """Of the corpus, refused ones among them; None for targets captured before this was counted."""
    refused: dict[str, int]
    """How many documents for which kind of reason, by its first one."""


@dataclass(frozen=True)
class Timings:
    seconds: dict[str, float]
    """Wall seconds by stage, as far as this command ran them."""
    tokens_per_s: dict[str, float]
    """`teacher` (per replica), `train` and `evaluate` (forward passes of one student); absent where not measured."""
    untimed_units: int
    """Units whose capture's seconds are not known; `tokens_per_s["teacher"]` is over the others alone."""


@dataclass(frozen=True)
class Evaluation:
    """Sums over the held-out rows, by model."""

    teacher: MetricSums
    before: MetricSums
    after: MetricSums
    kept_mass: KeptMassHistogram
    tokens_per_s: float
    """Tokens by seconds of the student's forward passes, loading excluded."""
    sketch: HeldOutSketch | None = None
    """What the next run measures drift against."""


def build_report(
    evaluation: Evaluation,
    *,
    recipe: dict[str, Any],
    identity: RunIdentity,
    timings: Timings,
    tokens: TokenCounts,
    targets: TargetFigures,
    history: list[dict[str, float]],
    require: Mapping[str, Any],
    audit: Mapping[str, Any] | None = None,
    holdout: Mapping[str, Any] | None = None,
    baseline: Baseline | None = None,
    drift: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report as plain JSON values.

    Args:
        recipe: the fields whose fingerprint is `identity.recipe`, as JSON values.
        history: one entry a training step: `step`, `loss`, `ce`, `kl_t`, `kl_t1`, …
        require: bounds of `evaluate.require`, as `EvaluateSection.bounds` gives them.
        audit: figures of the audit that these targets passed before training; None where there was none.

        holdout: `fingerprint` and number of the held-out `sequences`.
        baseline: the version that relative bounds compare with; None before the first one.
        drift: of the corpus, as `corpus_drift` gives it; None before the second run.
        cost: of all commands, as `distill_ray.cost.account` gives it; None where it is not known.

    Raises:
        UserError: a metric is not finite, or a bound names an unknown metric.
    """
    sums = {"teacher": evaluation.teacher, "before": evaluation.before, "after": evaluation.after}
    metrics = {model: s.metrics(model) for model, s in sums.items()}
    report = {
        "schema_version": SCHEMA_VERSION,
        **metrics,
        "identity": asdict(identity),
        "recipe": recipe,
        "timings": asdict(timings),
        "tokens": asdict(tokens),
        "targets": asdict(targets),
        "audit": None if audit is None else dict(audit),
        "training": {"steps": len(history), **({"first": history[0], "last": history[-1]} if history else {})},
        "calibration": {model: s.calibration() for model, s in sums.items()},
        "kept_mass": evaluation.kept_mass.to_json(),
        "holdout": dict(holdout or {}),
        "baseline": None if baseline is None else {"version": baseline.version},
        "drift": None if drift is None else dict(drift),
        "cost": None if cost is None else dict(cost),
        "definitions": DEFINITIONS | DRIFT_DEFINITIONS,
    }
    return report | {"gate": judge(report, require, baseline)}


def to_bytes(report: dict[str, Any]) -> bytes:
    """JSON in the report's own order, so that the page written anew from it is the first one; newline at the end.

    Raises:
        IntegrityError: a value is NaN or infinite; JSON has neither, and neither may be written silently.
    """
    try:
        return (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError:
        bad = ", ".join(_not_finite(report, ""))
        raise IntegrityError(f"the report holds values that are not finite: {bad}; nothing was written") from None


def _not_finite(value: Any, path: str) -> Iterable[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{path}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} = {value}"


def read_history(lines: bytes) -> list[dict[str, float]]:
    """Training steps from metrics.jsonl, one line a step, from step 0 on.

    Raises:
        IntegrityError: a line is no JSON object, or is not the step that its place says. Workers write the object
            whole, so neither can come from a kill.
    """
    steps: list[dict[str, float]] = []
    for number, line in enumerate(lines.splitlines()):
        try:
            entry = json.loads(line)
            found = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            raise IntegrityError(
                f"line {number + 1} of the training history is no step: {line[:60]!r}; run `distill-ray train` again"
            ) from None
        if found != number:
            raise IntegrityError(
                f"line {number + 1} of the training history is step {found}, not {number}; run `distill-ray train` "
                "again"
            )
        steps.append(entry)
    return steps
