"""The published student: a Hugging Face folder with its model card, named by a manifest that is written last.

Each export has a folder of its own under `models/<name>/<version>/`, named by what it is made from: what `latest.json`
points to is written over only to mend it, and goes only after `latest` has moved on.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray import checkpoints
from distill_ray.config import Recipe
from distill_ray.config.naming import model_name
from distill_ray.errors import DistillError, IntegrityError
from distill_ray.lease import (
    LeaseToken,
    folder_of,
    publish,
    read_published,
    read_whole_folder,
    require_owned,
    store_folder,
)
from distill_ray.registry import Latest, publish_latest, read_latest, retract_latest, version_order
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


def undone(recipe: Recipe, storage: Storage) -> str | None:
    """Why the published student and report have to be exported again, or `latest` decided on; None where all stands."""
    published = read_published(storage, recipe.run_prefix)
    if not {"student", "report", "export"} <= published.keys():
        return "it was interrupted"
    entry, decided = published["export"], published.get(LATEST)
    wanted = _links(recipe, published["student"]["sha256"], published["report"]["sha256"])
    if any(entry.get(key) != value for key, value in wanted.items()):
        return "its student, report, type or licence changed"
    try:
        read_whole_folder(storage, entry)
        if decided is None or decided["export"] != entry["sha256"]:
            return "it was interrupted"
        return _latest_moved_away(recipe, storage, entry, passed=decided["passed"])
    except IntegrityError as error:
        return str(error)


def model_uri(recipe: Recipe, storage: Storage) -> str:
    """Where the published model lies."""
    return f"{storage.uri}/{folder_of(read_published(storage, recipe.run_prefix)['export'])}"


def run(
    recipe: Recipe,
    storage: Storage,
    token: LeaseToken,
    report: dict[str, Any],
    progress: Callable[[str, int | None, str], Progress] = Progress,
) -> ExportResult:
    """Publish the trained student under `models/<name>/<version>/<id>/` and, if the gate holds, as the latest.

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
            _make_folder(recipe, storage, published["student"], report, folder)
            entry = _store(recipe, storage, token, folder, wanted, progress) | wanted
        publish(storage, token, "export", entry)
    passed = not failures(report["gate"])
    model = {"key": entry["key"], "sha256": entry["sha256"], "figures": report["after"]}
    reason = _move_latest(recipe, storage, token, model, report)
    _remove_others(recipe, storage, token, entry)
    if not recipe.train.keep_checkpoints_after_export:
        checkpoints.release(storage, token)
    # Published last: a driver killed before this line decides and clears up again when it is run again.
    decided = {"export": entry["sha256"], "passed": passed, "reason": reason, "model": model}
    publish(storage, token, LATEST, decided)
    return ExportResult(f"{storage.uri}/{folder_of(entry)}", not reason, reason)


def _is_whole(storage: Storage, entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    if any(entry.get(key) != value for key, value in wanted.items()):
        return False
    try:
        read_whole_folder(storage, entry)
    except IntegrityError:
        return False
    return True


def _make_folder(
    recipe: Recipe, storage: Storage, student: dict[str, Any], report: dict[str, Any], folder: Path
) -> None:
    convert_folder(stage_student(storage, student), folder, recipe.export.dtype)
    section, teacher = recipe.export, _teacher_name(recipe)
    base = None if recipe.student.config else model_name(recipe.student.model or recipe.teacher.model)
    card = model_card(report, teacher=teacher, base=base, licence=section.licence, dtype=section.dtype)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _store(
    recipe: Recipe,
    storage: Storage,
    token: LeaseToken,
    folder: Path,
    wanted: dict[str, Any],
    progress: Callable[[str, int | None, str], Progress],
) -> dict[str, Any]:
    """Store the local `folder`, its manifest last; returns the entry to publish."""
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    about = {
        "schema_version": 1,
        "name": recipe.name,
        "version": recipe.version,
        "dtype": recipe.export.dtype,
        "student": wanted["student"],
    }
    with progress("export", sum(path.is_file() for path in folder.rglob("*")), "files") as shown:
        return store_folder(storage, token, f"{recipe.model_prefix}/{name}", folder, about, lambda: shown.advance(1))


def _remove_others(recipe: Recipe, storage: Storage, token: LeaseToken, entry: dict[str, Any]) -> None:
    """Everything under this version that is not the published export: older ones, and what a kill left."""
    # Listed before the lease is looked at: what a successor writes after that is not in the list.
    for info in list(storage.list(f"{recipe.model_prefix}/")):
        if not info.key.startswith(f"{folder_of(entry)}/"):
            require_owned(storage, token)
            storage.delete(info.key)


def _move_latest(
    recipe: Recipe, storage: Storage, token: LeaseToken, model: dict[str, Any], report: dict[str, Any]
) -> str:
    """Why `latest` does not point to this version; empty where it does."""
    how: dict[str, Any] = {
        "others": lambda: list(_could_be_latest(storage, recipe.name)),
        "guard": lambda: require_owned(storage, token),
    }
    missed = failures(report["gate"])
    if missed:
        retract_latest(storage, recipe.name, recipe.version, **how)
        return f"the student misses {len(missed)} bound(s): {'; '.join(missed)}"
    current = publish_latest(storage, recipe.name, recipe.version, model, **how)
    if current.version == recipe.version:
        return ""
    return (
        f"the latest stays {current.version}, which sorts after {recipe.version} (numbers by value, text before "
        "numbers); give this recipe another name if it is another model"
    )


def _could_be_latest(storage: Storage, name: str) -> Iterator[Latest]:
    """Every version that is whole and kept its bounds, as its own run's record has it."""
    for info in storage.list(f"runs/{name}/"):
        version, _, rest = info.key.removeprefix(f"runs/{name}/").partition("/")
        if rest != "lease.json":
            continue
        published = read_published(storage, f"runs/{name}/{version}")
        decided, entry, report = (published.get(key) for key in (LATEST, "export", "report"))
        if not (decided and entry and report) or not decided["passed"]:
            continue
        if (
            decided["export"] == entry["sha256"]
            and entry["report"] == report["sha256"]
            and _is_whole(storage, entry, {})
        ):
            yield Latest(name, version, time.time(), decided["model"])


def _latest_moved_away(recipe: Recipe, storage: Storage, entry: dict[str, Any], *, passed: bool) -> str | None:
    """How `latest.json` contradicts what was decided; None where it does not."""
    current = read_latest(storage, recipe.name)
    ours = current is not None and current.version == recipe.version
    if not passed:
        return "latest.json names it although it misses a bound" if ours else None
    if current is None:
        return "latest.json is missing"
    if ours:
        return None if current.entry.get("sha256") == entry["sha256"] else "latest.json names another export"
    stays = version_order(current.version) > version_order(recipe.version)
    return None if stays else f"latest.json names the older {current.version}"


def _teacher_name(recipe: Recipe) -> str:
    name = model_name(recipe.teacher.model)
    return f"{name}@{recipe.teacher.revision}" if recipe.teacher.revision else name
