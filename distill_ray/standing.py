"""Which of a run's published stages stand as they are, and which have to be done again: what `run` and `status` ask."""

from __future__ import annotations

from typing import Any

from distill_ray import audit, capture, evaluate, export, train
from distill_ray.config import Recipe
from distill_ray.errors import IntegrityError
from distill_ray.forgotten import read_forgotten
from distill_ray.lease import read_document, read_published
from distill_ray.report import page_damage
from distill_ray.schema import ARTEFACT_OF
from distill_ray.storage import Storage


def due(recipe: Recipe, storage: Storage, published: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What `run` would do now: stage → why, in their order; empty where the run is finished and whole."""
    found: dict[str, str] = {}
    for stage, name in ARTEFACT_OF.items():
        if stage == "audit" and not audit_is_due(recipe, storage, "export"):
            continue
        before = "evaluate" if stage == "export" else "train"
        if name not in published:
            found[stage] = "not done yet"
        elif stage in ("evaluate", "export") and before in found:
            found[stage] = f"it is of what {before} made before"
        elif (reason := undone(stage, recipe, storage, published, "export")) is not None:
            gone = withdrawn(storage, recipe.run_prefix) if stage == "capture" else None
            found[stage] = f"refused: {gone}" if gone else reason
    return found


def withdrawn(storage: Storage, run_prefix: str) -> str | None:
    """What of the run's targets is gone on purpose, and stays so; None where nothing is."""
    units = read_forgotten(storage).runs.get(run_prefix)
    if units is None:
        return None
    return (
        f"{units:,} of the run's units are of withdrawn sources (`distill-ray gc --forget`) and are not captured "
        "again; give a new --version without those sources"
    )


def audit_is_due(recipe: Recipe, storage: Storage, until: str) -> bool:
    """Whether the audit is asked for, or stands before a training to come."""
    if until == "audit":
        return True
    student = read_published(storage, recipe.run_prefix).get("student")
    return recipe.audit.is_on and (student is None or train.damage(storage, student) is not None)


def undone(
    stage: str, recipe: Recipe, storage: Storage, published: dict[str, dict[str, Any]], until: str
) -> str | None:
    """Why a published stage has to be done again; None where it stands.

    Damage is found by sizes and by checksums of documents; contents are verified by whoever loads them.
    """
    entry = published[ARTEFACT_OF[stage]]
    if stage == "train":
        return train.damage(storage, entry)
    if stage == "export":
        return export.undone(recipe, storage)
    try:
        read_document(storage, entry, "it is made anew")
    except IntegrityError as error:
        return str(error)
    if stage == "evaluate":
        return evaluate.outdated(recipe, published) or page_damage(storage, entry)
    if stage == "audit":
        return audit.outdated(recipe, published)
    return capture.damage(storage, entry) if _needs_targets(recipe, storage, published, until) else None


def _needs_targets(recipe: Recipe, storage: Storage, published: dict[str, dict[str, Any]], until: str) -> bool:
    """Whether training, evaluation or an audit that is asked for still has to read the target objects."""
    return any(
        ARTEFACT_OF[stage] not in published or undone(stage, recipe, storage, published, until) is not None
        for stage in ("train", "evaluate", *(("audit",) if until == "audit" else ()))
        # Judging figures again needs no target, and must not pay for a teacher where the targets were cleared away.
        if not (stage == "evaluate" and evaluate.only_bounds_changed(recipe, storage, published))
    )
