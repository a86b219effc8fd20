"""Reading back the trained student that a run has published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_ray.errors import IntegrityError
from distill_ray.lease import file_sha256, folder_of, read_document
from distill_ray.storage import Storage, is_s3, stage_folder

_REMEDY = "remove that folder and run `distill-ray train` again: it goes on from the last checkpoint and writes it anew"


def stage_student(storage: Storage, entry: Mapping[str, Any]) -> Path:
    """A local folder with the published student, every file checked before anything loads it.

    Args:
        storage: the run's root.
        entry: "student" of the lease record: the manifest's key and SHA-256.

    Raises:
        IntegrityError: the manifest or a file is missing, short or altered.
    """
    data = read_document(storage, entry, _REMEDY)
    uri = f"{storage.uri}/{folder_of(entry)}"
    files = json.loads(data)["files"]
    folder = stage_folder(uri)
    if is_s3(uri) and any(_problem(folder / file["name"], file) for file in files):
        # It may be this machine's copy that was damaged, long after it came whole.
        folder = stage_folder(uri, expect={file["name"]: file["sha256"] for file in files})
    for file in files:
        if problem := _problem(folder / file["name"], file):
            raise IntegrityError(f"{uri}/{file['name']} {problem}; {_REMEDY}")
    return folder


def _problem(path: Path, file: Mapping[str, Any]) -> str | None:
    """How a file differs from its manifest's entry; None where it does not."""
    if not path.exists():
        return "is missing"
    got = path.stat().st_size
    if got != file["size"]:
        return f"has {got} bytes, its manifest says {file['size']}"
    found = file_sha256(path)
    if found != file["sha256"]:
        return f"has SHA-256 {found[:12]}…, its manifest says {file['sha256'][:12]}…"
    return None
