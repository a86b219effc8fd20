"""The report's figures that need no scoring: identity, token counts, rates, what the targets weigh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill_ray import report as reports
from distill_ray.config import Recipe, fingerprint, identity_of

if TYPE_CHECKING:
    from distill_ray.targets import RunManifest


def run_identity(recipe: Recipe, manifest: RunManifest, student_sha256: str) -> reports.RunIdentity:
    """What was computed, by fingerprint."""
    units = sorted([u.unit, u.multiplicity] for u in manifest.units)
    return reports.RunIdentity(
        name=recipe.name,
        version=recipe.version,
        capture=manifest.identity.fingerprint,
        units=len(units),
        corpus=fingerprint({"units": units}),
        teacher=fingerprint(dict(manifest.identity.teacher)),
        tokenizer=manifest.identity.tokenizer,
        student=student_sha256,
        recipe=fingerprint(identity_of(recipe)),
    )


def token_counts(
    entry: Mapping[str, Any], manifest: RunManifest, history: list[dict[str, float]], held_out: int
) -> reports.TokenCounts:
    """Tokens captured by this run and reused, and supervised tokens trained on and held out.

    Args:
        entry: "targets" of the run's record.
        manifest: the run's targets.
        history: one line a training step.
        held_out: supervised rows scored.
    """
    total = sum(int(u.lengths.sum()) for u in manifest.units)
    captured = int(entry["captured_tokens"])
    return reports.TokenCounts(
        captured=captured,
        reused=total - captured,
        supervised_train=int(sum(step["tokens"] for step in history)),
        held_out=held_out,
    )


def rates(manifest: RunManifest, history: list[dict[str, float]], evaluation_tokens_per_s: float) -> dict[str, float]:
    """Tokens/s of teacher (per replica), training and evaluation; a stage without a measured second is left out."""
    rates = {"evaluate": evaluation_tokens_per_s}
    if manifest.teacher_seconds > 0:
        rates["teacher"] = sum(int(u.lengths.sum()) for u in manifest.units) / manifest.teacher_seconds
    train_s = sum(step["seconds"] for step in history)
    if train_s > 0:
        rates["train"] = sum(step["tokens"] for step in history) / train_s
    return rates


def target_figures(manifest: RunManifest) -> reports.TargetFigures:
    """What the targets weigh and hold."""
    return reports.TargetFigures(
        rows=manifest.rows,
        bytes_per_row=sum(u.object_bytes for u in manifest.units) / manifest.rows,
        mean_kept_mass=manifest.mean_kept_mass,
        dead_letters=manifest.dead,
    )


def audit_figures(published: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the published audit of the run's very targets compared; None where there is no such audit."""
    entry = published.get("audit")
    if entry is None or not entry["passed"] or entry["targets"] != published["targets"]["sha256"]:
        return None
    return {name: entry[name] for name in ("path", "dtype", "units", "sequences", "rows", "worst_nats", "tolerance")}
