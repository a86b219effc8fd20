"""The main job: capture, audit, train, evaluate, export, each skipped where its artefact is already published.

Stages meet only through storage. A run's record (`lease.json`) names every finished artefact, so a killed run goes on
where it stopped when the same command is given again, and a finished one answers at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distill_ray import audit, capture, corpus, cost, evaluate, export, forecast, standing, targets, teacher, train
from distill_ray.config import Recipe, fingerprint, identity_of
from distill_ray.errors import DistillError, UserError
from distill_ray.lease import Lease, LeaseToken, publish, read_published
from distill_ray.preflight import Finding, check
from distill_ray.report import failures, read_report, unjudged
from distill_ray.schema import ARTEFACT_OF
from distill_ray.session import private_cpus, ray_session
from distill_ray.storage import Storage, open_storage, stage_folder
from distill_ray.telemetry import Progress, say
from distill_ray.units import in_sorted

STAGES = tuple(ARTEFACT_OF)


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    report: dict[str, Any]
    report_uri: str
    model_uri: str | None
    """None where the run was not brought as far as export."""
    gate_passed: bool
    notes: tuple[str, ...] = ()
    """Things worth a sentence, such as corpus units that came after this version was captured."""


def run(
    recipe: Recipe,
    *,
    until: str = "export",
    address: str | None = None,
    stop: threading.Event | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
    on_finding: Callable[[Finding], None] = lambda _: None,
) -> RunResult | None:
    """Bring a run up to and including the stage `until`; whatever is already done is kept.

    Args:
        recipe: what to compute and where it lies.
        until: "capture", "audit", "train", "evaluate" or "export".
        address: of a Ray cluster; None or "local" starts a private one.
        stop: set it to stop cleanly; everything finished is kept.
        on_stage: called with a stage's name as it starts.
        on_finding: called with everything that `check` finds right, before anything expensive starts.

    Returns:
        The result when `until` is "evaluate" or "export", else None.

    Raises:
        UserError: the recipe is wrong, does not fit what lies in storage, or another driver holds the run.
        IntegrityError: stored data is damaged, or the audit found targets that are not the teacher's.
        StoppedError: `stop` was set.
    """
    if until not in STAGES:
        raise UserError(f"no stage is called {until!r}; use one of {', '.join(STAGES)}")
    if until == "audit":
        audit.require_sample(recipe)
    stop = stop or threading.Event()
    storage = open_storage(recipe.storage.root)
    if not is_done(recipe, until):
        for finding in check(recipe, address=address):
            on_finding(finding)
        identity = run_identity(recipe)
        _same_run(recipe, storage, identity)
        predicted = _forecast(recipe, storage, on_finding)
        session = ray_session(address, num_cpus=private_cpus(recipe))
        with Lease.acquire(storage, recipe.run_prefix) as lease, session:
            _same_run(recipe, storage, identity)  # another driver may have begun the run since
            if predicted is not None:
                publish(storage, lease.token, cost.FORECAST, predicted.to_json())
            publish(storage, lease.token, "identity", {"fingerprint": fingerprint(identity), "of": identity})
            for stage in STAGES[: STAGES.index(until) + 1]:
                if stage == "audit" and not standing.audit_is_due(recipe, storage, until):
                    continue
                on_stage(stage)
                _stage(stage, recipe, storage, lease.token, stop, until)
                lease.check()
    else:
        _same_run(recipe, storage, run_identity(recipe))
    if until not in ("evaluate", "export"):
        return None
    return _result(recipe, storage, exported=until == "export")


def _forecast(recipe: Recipe, storage: Storage, on_finding: Callable[[Finding], None]) -> cost.Forecast | None:
    """What the run will take, of a run that nobody has begun; later it would be a forecast of the rest."""
    if "identity" in read_published(storage, recipe.run_prefix):
        return None
    predicted = forecast.predict(recipe, capture.capture_identity(recipe))
    on_finding(Finding("forecast", cost.forecast_sentence(predicted)))
    return predicted


def is_done(recipe: Recipe, until: str = "export") -> bool:
    """Whether the stage `until` is done and what it made is whole and of this recipe."""
    storage = open_storage(recipe.storage.root)
    published = read_published(storage, recipe.run_prefix)
    # Where a student is trained and whole, nobody asks for the audit before it.
    stages = [stage for stage in STAGES[: STAGES.index(until) + 1] if stage != "audit" or until == "audit"]
    if not all(ARTEFACT_OF[stage] in published for stage in stages):
        return False
    # A report of other settings leaves a whole export behind.
    last = {"export": ("evaluate", "export"), "audit": ("capture", "audit")}.get(until, (until,))
    return all(standing.undone(stage, recipe, storage, published, until) is None for stage in last)


def run_identity(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides what is captured and trained, apart from the corpus, which units identify.

    Report and export state what they were made with themselves: they are cheap, and simply made anew.
    """
    identity = {k: v for k, v in identity_of(recipe).items() if k not in ("audit", "evaluate", "export")}
    captured = capture.capture_identity(recipe)
    identity["capture_fingerprint"] = captured.fingerprint
    identity["teacher"]["dtype"] = captured.teacher["dtype"]  # `auto` and the very dtype it means are one run
    if recipe.student.model is not None:
        identity["student_weights"] = teacher.weights_identity(recipe.student.model, None)
    if recipe.student.config is not None:
        text = (stage_folder(recipe.student.config) / "config.json").read_text(encoding="utf-8")
        identity["student_config"] = json.loads(text)
    return json.loads(json.dumps(identity))


def _same_run(recipe: Recipe, storage: Storage, identity: dict[str, Any]) -> None:
    recorded = read_published(storage, recipe.run_prefix).get("identity")
    if recorded is None or recorded["fingerprint"] == fingerprint(identity):
        return
    before, now = _flat(recorded["of"]), _flat(identity)
    changed = [f"{k}: {before.get(k)} → {now.get(k)}" for k in sorted(before | now) if before.get(k) != now.get(k)]
    raise UserError(
        f"run {recipe.name}/{recipe.version} was started with another recipe ({len(changed)} difference(s)):\n  "
        + "\n  ".join(changed)
        + "\nrestore them, or give this recipe its own --version"
    )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return out


def _stage(stage: str, recipe: Recipe, storage: Storage, token: LeaseToken, stop: threading.Event, until: str) -> None:
    published = read_published(storage, recipe.run_prefix)
    if ARTEFACT_OF[stage] in published:
        reason = standing.undone(stage, recipe, storage, published, until)
        if reason is None:
            return
        if stage == "capture" and (gone := standing.withdrawn(storage, recipe.run_prefix)):
            raise UserError(f"{reason}: {gone}")
        say(stage, f"done again: {reason}")
    started = time.monotonic()
    if stage == "capture":
        capture.run(recipe, storage, token, stop, Progress)
    elif stage == "export":
        export.run(recipe, storage, token, read_report(storage, recipe.run_prefix))
    elif stage == "evaluate" and evaluate.only_bounds_changed(recipe, storage, published):
        evaluate.rejudge(recipe, storage, token)
    else:
        manifest = targets.read_run_manifest(storage, published["targets"])
        evaluate.require_held_out(manifest, recipe)
        if stage == "audit":
            audit.run(recipe, storage, manifest, token, stop, Progress)
        elif stage == "train":
            train.run(recipe, storage, manifest, token, stop, Progress)
        else:
            timings = {
                n.removeprefix("timings/"): e["seconds"] for n, e in published.items() if n.startswith("timings/")
            }
            evaluate.run(recipe, storage, manifest, token, timings=timings, stop=stop)
    publish(storage, token, f"timings/{stage}", {"seconds": round(time.monotonic() - started, 3)})


def _result(recipe: Recipe, storage: Storage, *, exported: bool) -> RunResult:
    published = read_published(storage, recipe.run_prefix)
    report = read_report(storage, recipe.run_prefix)
    passed = not failures(report["gate"])
    notes = [_new_units(recipe, storage, published)]
    notes += [f"not judged: {each}" for each in unjudged(report["gate"])]
    notes.append((report.get("drift") or {}).get("warning", ""))
    if exported and passed:
        notes.append(published[export.LATEST]["reason"])
    return RunResult(
        report=report,
        report_uri=f"{storage.uri}/{recipe.run_prefix}/report.html",
        model_uri=export.model_uri(recipe, storage) if exported else None,
        gate_passed=passed,
        notes=tuple(filter(None, notes)),
    )


def _new_units(recipe: Recipe, storage: Storage, published: dict[str, dict[str, Any]]) -> str:
    """A sentence on corpus units that came after this version was captured; empty where none did."""
    try:
        manifest = targets.read_run_manifest(storage, published["targets"])
        tokenizer = corpus.load_tokenizer(
            stage_folder(recipe.teacher.model, weights=False), recipe.teacher.trust_remote_code
        )
        units = corpus.plan_units(
            recipe.corpus,
            corpus.tokenizer_identity(tokenizer),
            storage,
            prompts=recipe.capture.generate is not None,
        )
    except DistillError as error:
        return f"could not look for new corpus units: {error}"  # what is finished needs no corpus
    new = int((~in_sorted(manifest.units.hashes, units.hashes)).sum())
    return f"{new} corpus unit(s) came after this version; give --version to run on them" if new else ""
