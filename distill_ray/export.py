"""The published student: a Hugging Face folder with its model card, named by a manifest that is written last."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray.config import Recipe, identity_of
from distill_ray.errors import DistillError, IntegrityError
from distill_ray.lease import LeaseToken, publish, read_published, read_whole_folder, store_folder
from distill_ray.registry import publish_latest, read_latest
from distill_ray.report import failures, model_card, to_bytes
from distill_ray.storage import Storage
from distill_ray.student.published import stage_student
from distill_ray.student.weights import convert_folder
from distill_ray.telemetry import Progress

LATEST = "latest"
"""Name under which a run publishes that the decision on `latest.json` was taken, and by what."""


@dataclass(frozen=True)
class ExportResult:
    """Where the model lies, and whether `latest` points to it."""

    uri: str
    is_latest: bool
    reason: str
    """Why `latest` does not point to this version; empty where it does."""


def _links(recipe: Recipe, student_sha256: str, report_sha256: str) -> dict[str, Any]:
    """What an export is made from; it is the wanted one as long as these stay the same."""
    return {
        "student": student_sha256,
        "report": report_sha256,
        "dtype": recipe.export.dtype,
        "licence": recipe.export.licence,
    }


def is_done(recipe: Recipe, storage: Storage) -> bool:
    """Whether the export of the published student and report is whole and `latest` was decided on."""
    published = read_published(storage, recipe.run_prefix)
    if not {"student", "report", "export", LATEST} <= published.keys():
        return False
    wanted = _links(recipe, published["student"]["sha256"], published["report"]["sha256"])
    entry = published["export"]
    return published[LATEST]["export"] == entry["sha256"] and _is_whole(storage, entry, wanted)


def run(
    recipe: Recipe,
    storage: Storage,
    token: LeaseToken,
    report: dict[str, Any],
    progress: Callable[[str, int | None, str], Progress] = Progress,
) -> ExportResult:
    """Publish the trained student under `models/<name>/<version>/` and, if the gate holds, as the latest.

    A whole export that was published before is left as it is; an interrupted one is done again.

    Args:
        recipe: type of the weights, licence, name and version.
        storage: the run's root.
        token: of the run's lease; the export is published against it.
        report: as evaluation wrote it.
        progress: makes the progress display.

    Raises:
        IntegrityError: the stored student is not the one that was published.
        UserError: the weights do not fit `export.dtype`.
        LeaseLostError: another driver owns the run.
    """
    published = read_published(storage, recipe.run_prefix)
    if "student" not in published:
        raise DistillError(f"run {recipe.run_prefix} has no trained student yet; run `distill-ray train` first")
    wanted = _links(recipe, published["student"]["sha256"], hashlib.sha256(to_bytes(report)).hexdigest())
    entry = published.get("export")
    if entry is None or not _is_whole(storage, entry, wanted):
        with tempfile.TemporaryDirectory(prefix="export-") as work:
            folder = Path(work) / "model"
            entry = _export(recipe, storage, token, published["student"], report, folder, progress) | wanted
        publish(storage, token, "export", entry)
    reason = _move_latest(recipe, storage, entry, report)
    # Published last: a driver killed before this line decides again when it is run again.
    publish(storage, token, LATEST, {"export": entry["sha256"], "reason": reason})
    return ExportResult(f"{storage.uri}/{recipe.model_prefix}", not reason, reason)


def _is_whole(storage: Storage, entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    if any(entry.get(key) != value for key, value in wanted.items()):
        return False
    try:
        read_whole_folder(storage, entry)
    except IntegrityError:
        return False
    return True


def _export(
    recipe: Recipe,
    storage: Storage,
    token: LeaseToken,
    student: dict[str, Any],
    report: dict[str, Any],
    folder: Path,
    progress: Callable[[str, int | None, str], Progress],
) -> dict[str, Any]:
    """Make the local `folder`, store it, its manifest last; returns the entry to publish."""
    convert_folder(stage_student(storage, student), folder, recipe.export.dtype)
    # Identity fields alone: where things lie may be private, and computes nothing.
    card = model_card(report, teacher=_teacher_name(recipe), licence=recipe.export.licence, recipe=identity_of(recipe))
    (folder / "README.md").write_text(card, encoding="utf-8")
    about = {
        "schema_version": 1,
        "name": recipe.name,
        "version": recipe.version,
        "dtype": recipe.export.dtype,
        "student": student["sha256"],
    }
    with progress("export", sum(1 for _ in folder.iterdir()), "files") as shown:
        return store_folder(storage, token, recipe.model_prefix, folder, about, lambda: shown.advance(1))


def _move_latest(recipe: Recipe, storage: Storage, entry: dict[str, Any], report: dict[str, Any]) -> str:
    """Why `latest` does not point to this version; empty where it does."""
    missed = failures(report["gate"])
    if missed:
        return f"the student misses {len(missed)} bound(s): {'; '.join(missed)}"
    wanted = {"key": entry["key"], "sha256": entry["sha256"], "figures": report["after"]}
    current = read_latest(storage, recipe.name)
    if current is None or (current.version, current.entry) != (recipe.version, wanted):
        current = publish_latest(storage, recipe.name, recipe.version, wanted)
    return "" if current.version == recipe.version else f"version {current.version} is newer and stays the latest"


def _teacher_name(recipe: Recipe) -> str:
    """The teacher without its location, which may be private."""
    name = recipe.teacher.model.rstrip("/").rpartition("/")[2]
    return f"{name}@{recipe.teacher.revision}" if recipe.teacher.revision else name
