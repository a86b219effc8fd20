"""Evaluation of one run: what is held out, the figures over it, and the report that publishes them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distill_ray import cost
from distill_ray import report as reports
from distill_ray.config import Recipe, identity_of
from distill_ray.errors import DistillError, IntegrityError
from distill_ray.evaluate.figures import (
    HELD_OUT_TOKENS,
    audit_figures,
    baseline,
    cost_figures,
    drift,
    holdout,
    rates,
    recipe_fields,
    run_identity,
    stored,
    target_figures,
    targets_time,
    token_counts,
    untimed_units,
)
from distill_ray.evaluate.scoring import ScoringJob, score_remotely
from distill_ray.ingest import BatchPlan, build_plan
from distill_ray.lease import LeaseToken, document_entry, put_owned, read_document, read_published
from distill_ray.storage import Storage
from distill_ray.telemetry import Progress

if TYPE_CHECKING:
    from distill_ray.targets import RunManifest


def require_held_out(manifest: RunManifest, recipe: Recipe) -> BatchPlan:
    """The plan of the held-out sequences, without opening a target object; call it before money goes into training.

    Raises:
        UserError: no held-out sequence has a supervised token, or `evaluate.require` names an unknown metric.
    """
    reports.check_require(recipe.evaluate.require)
    return build_plan(
        manifest,
        holdout=recipe.corpus.holdout,
        split="held_out",
        pack_tokens=recipe.train.pack_tokens,
        packs_per_batch=recipe.evaluate.batch_packs,
        max_sequences=recipe.evaluate.max_sequences,
    )


def run(
    recipe: Recipe,
    storage: Storage,
    manifest: RunManifest,
    token: LeaseToken,
    progress: Callable[[str, int | None, str], Progress] = Progress,
    *,
    timings: Mapping[str, float] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Score the held-out targets in one Ray task, then write and publish report.json and report.html.

    Args:
        recipe: the run.
        storage: the run's root.
        manifest: the targets that the run uses.
        token: of the run's lease; the report is published against it.
        progress: makes the progress display.
        timings: wall seconds by stage, for the report.
        stop: set it to stop; nothing is written then.

    Returns:
        The report, as written to report.json.

    Raises:
        UserError: nothing is held out, or a metric is not finite.
        IntegrityError: the student or its training history is not what was published.
        StoppedError: `stop` was set.
    """
    started = time.monotonic()
    plan = require_held_out(manifest, recipe)
    published = read_published(storage, recipe.run_prefix)
    if "student" not in published:
        raise DistillError(f"run {recipe.run_prefix} has no trained student yet; run `distill-ray train` first")
    history = _history(storage, published["student"])
    job = ScoringJob(recipe, storage, manifest.identity, plan, published["student"])
    with (
        progress("evaluate", 2 * plan.steps, "batches") as shown,
        cost.metered(recipe, storage, token, "evaluate") as meter,
    ):
        evaluation = score_remotely(replace(job, meter=meter), shown, stop or threading.Event())
    seconds = {**(timings or {}), "evaluate": round(time.monotonic() - started, 3)}
    against = baseline(recipe, storage, _own_report(recipe, storage))
    report = reports.build_report(
        evaluation,
        recipe=recipe_fields(recipe, manifest),
        identity=run_identity(
            recipe, manifest, str(published["student"]["sha256"]), published.get("identity", {}).get("of", {})
        ),
        timings=reports.Timings(
            seconds,
            rates(manifest, history, evaluation.tokens_per_s),
            untimed_units(manifest),
        ),
        cost=cost_figures(recipe, storage, published, stored(recipe, storage, manifest), targets_time(manifest)),
        tokens=token_counts(published["targets"], manifest, history, evaluation.teacher.rows),
        targets=target_figures(manifest, published["targets"]),
        history=history,
        require=recipe.evaluate.bounds(),
        audit=audit_figures(published),
        holdout=holdout(recipe, manifest, plan),
        baseline=against,
        drift=drift(recipe, storage, evaluation.sketch, against),
    )
    _publish(recipe, storage, token, report, history, _store_sketch(storage, token, evaluation.sketch))
    return report


def _store_sketch(storage: Storage, token: LeaseToken, sketch: reports.HeldOutSketch | None) -> dict[str, Any] | None:
    """Write `<run>/held-out-tokens.parquet`; returns its entry."""
    if sketch is None:
        return None
    key, data = f"{token.run_prefix}/held-out-tokens.parquet", sketch.to_bytes()
    put_owned(storage, token, key, data)
    return document_entry(key, data)


def outdated(recipe: Recipe, published: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the published report is not of this recipe and student; None where it is."""
    entry = published["report"]
    if entry.get("schema_version") != reports.SCHEMA_VERSION:
        return "another version of the software wrote it"
    if entry["student"] != published["student"]["sha256"]:
        return "it is of another training of the student"
    if entry["settings"] != json.loads(json.dumps(identity_of(recipe.evaluate))):
        return "other settings of [evaluate]"
    if entry["require"] != recipe.evaluate.bounds():
        return "other bounds of evaluate.require"
    if entry.get("drift_warn") != recipe.evaluate.drift_warn:
        return "another evaluate.drift_warn"
    if entry["prices"] != recipe.cost.prices():
        return "other prices of [cost]"
    return None


def only_bounds_changed(recipe: Recipe, storage: Storage, published: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the report's figures stand and only have to be judged anew."""
    entry = published.get("report")
    if entry is None:
        return False
    try:
        reports.read_report(storage, recipe.run_prefix)
    except IntegrityError:
        return False
    same = {**published, "report": {**entry, **_judged_by(recipe)}}
    return outdated(recipe, same) is None


def rejudge(recipe: Recipe, storage: Storage, token: LeaseToken) -> None:
    """Hold the published figures against the recipe's bounds and prices as they are now; nothing is scored again."""
    report = reports.read_report(storage, recipe.run_prefix)
    published = read_published(storage, recipe.run_prefix)
    if report["cost"] is not None:
        report["cost"] = cost_figures(recipe, storage, published, *cost.measured(report["cost"]))
    against = baseline(recipe, storage, report)
    report["baseline"] = None if against is None else {"version": against.version}
    report["gate"] = reports.judge(report, recipe.evaluate.bounds(), against)
    if report["drift"] is not None:
        report["drift"]["warning"] = reports.drift_warning(report, recipe.evaluate.drift_warn)
    sketch = published["report"].get(HELD_OUT_TOKENS)
    _publish(recipe, storage, token, report, _history(storage, published["student"]), sketch)


def _publish(
    recipe: Recipe,
    storage: Storage,
    token: LeaseToken,
    report: dict[str, Any],
    history: list[dict[str, float]],
    sketch: Mapping[str, Any] | None,
) -> None:
    judged = _judged_by(recipe)
    require = judged.pop("require")
    links = {**judged, HELD_OUT_TOKENS: sketch}
    reports.write_report(
        storage, token, report, history, settings=identity_of(recipe.evaluate), require=require, links=links
    )


def _judged_by(recipe: Recipe) -> dict[str, Any]:
    """What figures are judged and priced by; where only these change, nothing is scored again."""
    section = recipe.evaluate
    return {
        "require": section.bounds(),
        "drift_warn": section.drift_warn,
        "prices": recipe.cost.prices(),
    }


def _own_report(recipe: Recipe, storage: Storage) -> dict[str, Any] | None:
    """The report so far; None where there is none, or it is damaged and about to be written anew."""
    try:
        return reports.read_report(storage, recipe.run_prefix)
    except IntegrityError:
        return None


def _history(storage: Storage, student: Mapping[str, Any]) -> list[dict[str, float]]:
    """The very history that the published student was trained with."""
    entry = student["history"]
    history = reports.read_history(read_document(storage, entry, "run `distill-ray train` again"))
    if len(history) != entry["steps"]:
        raise IntegrityError(
            f"{storage.uri}/{entry['key']} holds {len(history)} steps, published were {entry['steps']}; run "
            "`distill-ray train` again"
        )
    return history
