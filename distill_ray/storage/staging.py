"""Folders that libraries want on a local disk: a teacher's weights, a student's, a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from distill_ray.errors import UserError
from distill_ray.storage.atomic import explain_os, locked, replace_durably, temporary_beside
from distill_ray.storage.base import ObjectInfo, Storage, StorageError
from distill_ray.storage.uris import is_s3, open_storage

# How long one process waits for another's download of the same folder.
_DOWNLOAD_S = 4 * 3600.0


def stage_folder(uri: str, cache: Path | None = None) -> Path:
    """A local folder with the objects under `uri`.

    A local folder is given back as it is. An `s3://` one is downloaded once per content into a folder of the user's
    cache, named by a hash over names, sizes and ETags, so that a changed source never alters a folder in use; a
    manifest beside it, written last, says that it is whole. Processes of one machine wait for each other.

    Args:
        uri: folder.
        cache: where to keep downloads; by default `$XDG_CACHE_HOME` (or `~/.cache`) `/distill_ray/staged`.

    Raises UserError if the folder is missing or empty, StorageError if the store or the disk refuses.
    """
    if not is_s3(uri):
        folder = Path(uri).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}; correct the path or put the files there")
        return folder
    storage = open_storage(uri)
    objects = sorted(storage.list(""), key=lambda each: each.key)
    if not objects:
        raise UserError(f"{uri}: no object lies under this prefix; correct the URI or upload the folder")
    manifest = json.dumps({"uri": storage.uri, "objects": [[o.key, o.size, o.version] for o in objects]}, indent=1)
    name = hashlib.sha256(manifest.encode()).hexdigest()[:32]
    root = cache or user_cache("staged")
    folder, marker = root / name, root / f"{name}.json"
    if marker.exists():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".lock-{name}", _DOWNLOAD_S):
            if not marker.exists():
                _download(storage, objects, folder)
                with temporary_beside(marker) as temporary:
                    temporary.write_text(manifest)
                    replace_durably(temporary, marker)
    except OSError as error:
        raise explain_os(error, folder, "write", sum(o.size for o in objects)) from error
    return folder


def _download(storage: Storage, objects: list[ObjectInfo], folder: Path) -> None:
    for each in objects:
        path = folder / each.key
        # Files come by rename, so one that is there from a killed attempt is whole.
        if path.exists() and path.stat().st_size == each.size:
            continue
        storage.download(each.key, path)
        if path.stat().st_size != each.size:
            path.unlink()
            raise StorageError(f"{storage.uri}/{each.key} changed while it was downloaded; run again")


def user_cache(name: str) -> Path:
    """This project's folder `name` in the user's cache, `$XDG_CACHE_HOME` or `~/.cache`; it may not exist yet.

    Raises UserError if there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "distill_ray" / name
    except RuntimeError as error:
        raise UserError("no home folder to keep downloads in; set XDG_CACHE_HOME") from error
