"""The published student: a Hugging Face folder with its model card, named by a manifest that is written last."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray.config import Recipe
from distill_ray.errors import DistillError, IntegrityError
from distill_ray.lease import LeaseToken, publish, read_published, read_whole_folder, store_folder
from distill_ray.registry import publish_latest, read_latest
from distill_ray.report import failures, model_card
from distill_ray.storage import Storage
from distill_ray.student.published import stage_student
from distill_ray.student.weights import convert_folder
from distill_ray.telemetry import Progress


@dataclass(frozen=True)
class ExportResult:
    """Where the model lies, and whether `latest` points to it."""

    uri: str
    is_latest: bool
    reason: str
    """Why `latest` does not point to this version; empty where it does."""


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
    student = published.get("student")
    if student is None:
        raise DistillError(f"run {recipe.run_prefix} has no trained student yet; run `distill-ray train` first")
    entry = published.get("export")
    if entry is None or not _is_whole(storage, entry, recipe, student):
        with tempfile.TemporaryDirectory(prefix="export-") as work:
            entry = _export(recipe, storage, student, report, Path(work) / "model", progress)
        publish(storage, token, "export", entry)
    return _move_latest(recipe, storage, entry, report)


def _is_whole(storage: Storage, entry: dict[str, Any], recipe: Recipe, student: dict[str, Any]) -> bool:
    """Whether the published export is of this student and type, and every file is there at its size."""
    try:
        manifest = read_whole_folder(storage, entry)
    except IntegrityError:
        return False
    return (manifest["student"], manifest["dtype"]) == (student["sha256"], recipe.export.dtype)


def _export(
    recipe: Recipe,
    storage: Storage,
    student: dict[str, Any],
    report: dict[str, Any],
    folder: Path,
    progress: Callable[[str, int | None, str], Progress],
) -> dict[str, Any]:
    """Make the local `folder`, store it, its manifest last; returns the entry to publish."""
    convert_folder(stage_student(storage, student), folder, recipe.export.dtype)
    card = model_card(
        report, teacher=_teacher_name(recipe), licence=recipe.export.licence, recipe=recipe.model_dump(mode="json")
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    about = {
        "schema_version": 1,
        "name": recipe.name,
        "version": recipe.version,
        "dtype": recipe.export.dtype,
        "student": student["sha256"],
    }
    with progress("export", sum(1 for _ in folder.iterdir()), "files") as shown:
        return store_folder(storage, recipe.model_prefix, folder, about, lambda: shown.advance(1))


def _move_latest(recipe: Recipe, storage: Storage, entry: dict[str, Any], report: dict[str, Any]) -> ExportResult:
    uri = f"{storage.uri}/{recipe.model_prefix}"
    missed = failures(report["gate"])
    if missed:
        return ExportResult(uri, False, f"the student misses {len(missed)} bound(s): {'; '.join(missed)}")
    wanted = {"key": entry["key"], "sha256": entry["sha256"], "figures": report["after"]}
    current = read_latest(storage, recipe.name)
    if current is None or (current.version, current.entry) != (recipe.version, wanted):
        current = publish_latest(storage, recipe.name, recipe.version, wanted)
    if current.version != recipe.version:
        return ExportResult(uri, False, f"version {current.version} is newer and stays the latest")
    return ExportResult(uri, True, "")


def _teacher_name(recipe: Recipe) -> str:
    """The teacher without its location, which may be private."""
    name = recipe.teacher.model.rstrip("/").rpartition("/")[2]
    return f"{name}@{recipe.teacher.revision}" if recipe.teacher.revision else name
