"""Reading back the trained student that a run has published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_ray.errors import IntegrityError
from distill_ray.lease import file_sha256, folder_of, read_document
from distill_ray.storage import Storage, stage_folder

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
    folder = stage_folder(uri)
    for file in json.loads(data)["files"]:
        _check(folder / file["name"], file["size"], file["sha256"], f"{uri}/{file['name']}")
    return folder


def _check(path: Path, size: int, sha256: str, uri: str) -> None:
    if not path.exists():
        raise IntegrityError(f"{uri} is missing; {_REMEDY}")
    got = path.stat().st_size
    if got != size:
        raise IntegrityError(f"{uri} has {got} bytes, its manifest says {size}; {_REMEDY}")
    found = file_sha256(path)
    if found != sha256:
        raise IntegrityError(f"{uri} has SHA-256 {found[:12]}…, its manifest says {sha256[:12]}…; {_REMEDY}")
