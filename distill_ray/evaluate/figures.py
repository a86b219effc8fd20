"""The report's figures that need no scoring: identity, token counts, rates, what the targets weigh."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_ray import cost
from distill_ray import report as reports
from distill_ray.config import Recipe, fingerprint, identity_of
from distill_ray.config.naming import model_name
from distill_ray.errors import IntegrityError
from distill_ray.lease import read_document, read_published
from distill_ray.registry import read_latest
from distill_ray.storage import Storage

HELD_OUT_TOKENS = "held_out_tokens"
"""Field of the published report that names its sketch."""

if TYPE_CHECKING:
    from distill_ray.ingest import BatchPlan
    from distill_ray.targets import RunManifest


def recipe_fields(recipe: Recipe, manifest: RunManifest) -> dict[str, Any]:
    """The recipe's identity fields behind the report's figures, as JSON values.

    Without `[export]`, which comes after the figures; and `teacher.dtype` is what `auto` meant.
    """
    fields = {name: value for name, value in identity_of(recipe).items() if name != "export"}
    fields["teacher"]["dtype"] = manifest.identity.teacher["dtype"]
    return json.loads(json.dumps(fields))


def run_identity(
    recipe: Recipe, manifest: RunManifest, student_sha256: str, began: Mapping[str, Any] = MappingProxyType({})
) -> reports.RunIdentity:
    """What was computed, by fingerprint.

    Args:
        began: what the run's record says that it was started with.
    """
    section, teacher = recipe.student, fingerprint(dict(manifest.identity.teacher))
    if section.teacher_layers is not None:
        layers = ", ".join(map(str, section.teacher_layers))
        start, weights = f"layers {layers} of {model_name(recipe.teacher.model)}", teacher
    elif section.config is not None:
        start, weights = f"random weights, seed {recipe.train.seed}, of {model_name(section.config)}", ""
    else:
        given = began.get("student_weights")
        start, weights = model_name(section.model or ""), fingerprint(dict(given)) if given else ""
    return reports.RunIdentity(
        name=recipe.name,
        version=recipe.version,
        capture=manifest.identity.fingerprint,
        units=len(manifest.units),
        corpus=manifest.corpus,
        teacher=teacher,
        tokenizer=manifest.identity.tokenizer,
        student=student_sha256,
        recipe=fingerprint(recipe_fields(recipe, manifest)),
        start=start,
        start_weights=weights,
    )


def holdout(recipe: Recipe, manifest: RunManifest, plan: BatchPlan) -> dict[str, Any]:
    """How many sequences are held out, and a fingerprint over what they are, wherever their sources and units lie.

    Documents by hash, how they were cut into sequences, and what decides that.
    """
    s, corpus = plan.sequences, recipe.corpus
    about = [manifest.identity.tokenizer, corpus.format, corpus.window_tokens, corpus.window_overlap]
    found = hashlib.sha256(json.dumps(about).encode())
    order = np.lexsort((s.supervised_S, s.length_S, s.doc_key_S))
    for column, kind in ((s.doc_key_S, "<u8"), (s.length_S, "<i8"), (s.supervised_S, "<i8")):
        found.update(np.ascontiguousarray(column[order], dtype=kind).tobytes())
    return {"fingerprint": found.hexdigest()[:32], "sequences": len(s.length_S)}


def baseline(recipe: Recipe, storage: Storage, own: Mapping[str, Any] | None) -> reports.Baseline | None:
    """The version that `latest.json` names, with its report; None before the first one.

    Args:
        recipe: names the run.
        storage: the run's root.
        own: the run's report so far. Where the run is itself the latest, it says what it was held against.
    """
    try:
        latest = read_latest(storage, recipe.name)
    except IntegrityError as error:
        return reports.Baseline("the latest version", None, str(error))
    version = None if latest is None else latest.version
    if version in (None, recipe.version):
        version = ((own or {}).get("baseline") or {}).get("version")
    if version is None:
        return None
    try:
        return reports.Baseline(version, reports.read_report(storage, f"runs/{recipe.name}/{version}"))
    except IntegrityError as error:
        return reports.Baseline(version, None, str(error))


def drift(
    recipe: Recipe, storage: Storage, sketch: reports.HeldOutSketch | None, against: reports.Baseline | None
) -> dict[str, Any] | None:
    """How far the held-out text is from that of the version `against`; None before the second run."""
    if sketch is None or against is None:
        return None
    then = _sketch_of(recipe, storage, against)
    if isinstance(then, str):
        found = reports.unknown_drift(against.version, then)
    else:
        found = reports.corpus_drift(sketch, then, against.version)
    return found | {"warning": reports.drift_warning({"drift": found}, recipe.evaluate.drift_warn)}


def _sketch_of(recipe: Recipe, storage: Storage, against: reports.Baseline) -> reports.HeldOutSketch | str:
    """The sketch of a version, or why there is none."""
    if against.report is None:
        return against.problem
    entry = read_published(storage, f"runs/{recipe.name}/{against.version}").get("report", {}).get(HELD_OUT_TOKENS)
    if entry is None:
        return "an older version of the software kept none"
    try:
        data = read_document(storage, entry, "the version after this one has a sketch to compare with again")
        return reports.HeldOutSketch.from_bytes(data, str(entry["key"]))
    except IntegrityError as error:
        return str(error)


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
    """Tokens/s of teacher (per replica), training and evaluation; a stage without a measured second is left out.

    The teacher's is over units of known seconds: others must not lend their tokens to these. Seconds lie in the index
    alone, and a driver killed between writing an object and writing the index takes them along.
    """
    rates = {"evaluate": evaluation_tokens_per_s}
    timed = [u for u in manifest.units if u.teacher_seconds > 0 and len(u.lengths)]
    if timed:
        rates["teacher"] = sum(int(u.lengths.sum()) for u in timed) / sum(u.teacher_seconds for u in timed)
    train_s = sum(step["seconds"] for step in history)
    if train_s > 0:
        rates["train"] = sum(step["tokens"] for step in history) / train_s
    return rates


def cost_figures(
    recipe: Recipe,
    storage: Storage,
    published: Mapping[str, Mapping[str, Any]],
    kept: cost.Stored,
    took: cost.TargetsTime,
) -> dict[str, Any]:
    """The report's `cost`, over all commands of the run that have left their usage by now."""
    usages, problems = cost.read_usage(storage, recipe.run_prefix)
    did = {"capture": published["targets"].get("captured", 0) > 0, "train": "student" in published}
    # Older software left none.
    unknown = [stage for stage, done in did.items() if done and stage not in {usage.stage for usage in usages}]
    found = cost.account(recipe, usages, problems=problems, unknown=unknown, stored=kept, targets=took)
    return found | {cost.FORECAST: published.get(cost.FORECAST)}


def stored(recipe: Recipe, storage: Storage, manifest: RunManifest) -> cost.Stored:
    """What the run keeps as of now, before its export."""
    run, model = (
        sum(info.size for info in storage.list(f"{prefix}/")) for prefix in (recipe.run_prefix, recipe.model_prefix)
    )
    return cost.Stored(manifest.units.sum_of("object_bytes"), run, model)


def targets_time(manifest: RunManifest) -> cost.TargetsTime:
    """What the run's targets took to capture, as the index knows."""
    return cost.TargetsTime(manifest.units.sum_of("teacher_seconds"), untimed_units(manifest))


def untimed_units(manifest: RunManifest) -> int:
    """Units with sequences whose capture's seconds are not known; see `rates`."""
    return sum(u.teacher_seconds == 0 and len(u.lengths) > 0 for u in manifest.units)


def target_figures(manifest: RunManifest, entry: Mapping[str, Any]) -> reports.TargetFigures:
    """What the targets weigh and hold, and what was refused, as the published `entry` of the targets says."""
    return reports.TargetFigures(
        rows=manifest.rows,
        bytes_per_row=sum(u.object_bytes for u in manifest.units) / manifest.rows,
        mean_kept_mass=manifest.mean_kept_mass,
        dead_letters=manifest.dead,
        documents=entry.get("documents"),
        refused=entry.get("refused", {}),
    )


def audit_figures(published: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the published audit of the run's very targets compared; None where there is no such audit."""
    entry = published.get("audit")
    if entry is None or not entry["passed"] or entry["targets"] != published["targets"]["sha256"]:
        return None
    return {name: entry[name] for name in ("path", "dtype", "units", "sequences", "rows", "worst_nats", "tolerance")}
