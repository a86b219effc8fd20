"""What an entry of the run's record points to: a document under its SHA-256, or a folder named by such a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distill_ray.errors import IntegrityError
from distill_ray.lease.record import LeaseToken, put_owned, require_owned
from distill_ray.storage import NotFoundError, Storage

_MANIFEST = "manifest.json"


def document_entry(key: str, data: bytes) -> dict[str, Any]:
    """The entry to publish for the stored document `key`."""
    return {"key": key, "sha256": hashlib.sha256(data).hexdigest()}


def read_document(storage: Storage, entry: Mapping[str, Any], remedy: str) -> bytes:
    """The bytes that an entry names.

    Args:
        storage: the run's store.
        entry: its "key" and "sha256".
        remedy: what the user should do where they cannot be had; ends the message.

    Raises:
        IntegrityError: missing, truncated, altered, or written by a driver that lost the run.
    """
    uri = f"{storage.uri}/{entry['key']}"
    try:
        data = storage.get(entry["key"])
    except NotFoundError:
        raise IntegrityError(f"{uri} is published but missing; {remedy}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise IntegrityError(
            f"{uri} ({len(data)} bytes) has SHA-256 {found[:12]}…, published was {entry['sha256'][:12]}…; {remedy}"
        )
    return data


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def store_folder(
    storage: Storage,
    token: LeaseToken,
    prefix: str,
    folder: Path,
    about: Mapping[str, Any],
    on_file: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Upload a folder's files under `prefix`, then a manifest with their sizes and checksums.

    What else lies under the prefix is removed first: a weights shard left by an interrupted upload of another layout
    would be loaded beside the new ones. A driver that lost its lease stops before its next file and cannot replace
    the manifest; the file it was in the midst of holds what its successor writes there too.

    Args:
        storage: the run's store.
        token: of the run's lease.
        prefix: key of the folder.
        folder: local; files in it and in folders below.
        about: further fields of the manifest.
        on_file: called after each file.

    Returns:
        The entry to publish.

    Raises:
        LeaseLostError: another driver took the run over.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    require_owned(storage, token)
    wanted = {_MANIFEST, *paths}
    for info in list(storage.list(f"{prefix}/")):
        if info.key.removeprefix(f"{prefix}/") not in wanted:
            storage.delete(info.key)
    files = []
    for name, path in paths.items():
        require_owned(storage, token)
        # Hashed before it leaves the local disk: a body corrupted on its way is found when it is read back.
        files.append({"name": name, "size": path.stat().st_size, "sha256": file_sha256(path)})
        storage.upload(path, f"{prefix}/{name}")
        on_file()
    data = (json.dumps({**about, "files": files}, sort_keys=True, indent=1) + "\n").encode()
    key = f"{prefix}/{_MANIFEST}"
    put_owned(storage, token, key, data)
    return document_entry(key, data)


def read_whole_folder(storage: Storage, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a published folder, once one listing shows every file at its size.

    Contents are verified by whoever loads them.

    Raises:
        IntegrityError: the manifest is not the published one; a file is missing or has another size.
    """
    remedy = "run the command again to write it anew"
    manifest = json.loads(read_document(storage, entry, remedy))
    problems = problems_of(storage, folder_of(entry), manifest["files"])
    if problems:
        raise IntegrityError(f"{storage.uri}/{folder_of(entry)}: {'; '.join(problems)}; {remedy}")
    return manifest


def folder_of(entry: Mapping[str, Any]) -> str:
    """Key of the folder whose manifest an entry names."""
    return entry["key"].rpartition("/")[0]


def problems_of(storage: Storage, prefix: str, files: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which of `files` ("name", "size") are missing under `prefix` or have the wrong size, one sentence each."""
    sizes = {info.key.removeprefix(f"{prefix}/"): info.size for info in storage.list(f"{prefix}/")}
    problems = []
    for file in files:
        size = sizes.get(file["name"])
        if size is None:
            problems.append(f"{file['name']} is missing")
        elif size != file["size"]:
            problems.append(f"{file['name']} has {size} bytes instead of {file['size']}")
    return problems
