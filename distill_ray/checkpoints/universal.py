"""Checkpoints converted for any number of workers: made once, kept under the checkpoint they come from, and reused."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path

from distill_ray.checkpoints.manifest import Manifest, load_manifest, problems_of, step_name
from distill_ray.checkpoints.moving import at_once, store_file
from distill_ray.errors import IntegrityError
from distill_ray.lease import LeaseToken, document_entry, read_published
from distill_ray.lease import publish as publish_entry
from distill_ray.storage import Storage

_PREFIX = "universal/"


def universal_of(storage: Storage, run_prefix: str, manifest: Manifest) -> Manifest | None:
    """The whole conversion of exactly this checkpoint, or None."""
    entry = read_published(storage, run_prefix).get(_PREFIX + step_name(manifest.step))
    if entry is None or entry["of"] != _digest(manifest):
        return None
    try:
        found = load_manifest(storage, entry)
    except IntegrityError:
        return None  # it is made anew
    return None if problems_of(storage, found) else found


def store_universal(
    storage: Storage, token: LeaseToken, manifest: Manifest, folder: Path, *, seconds: float = 0.0
) -> Manifest:
    """Upload the converted files, several at once, and publish them, with their size and what they took.

    Args:
        storage: the run's store.
        token: of the run's lease.
        manifest: of the checkpoint that was converted.
        folder: the conversion; names keep its inner folders.
        seconds: that the conversion took, without this upload.

    Raises:
        LeaseLostError: another driver took the run over; nothing was published.
    """
    prefix = f"{manifest.prefix}/universal-e{token.epoch:04d}"

    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    named = [(path.relative_to(folder).as_posix(), path) for path in paths]
    files = tuple(at_once(partial(store_file, storage, prefix), named))
    stored = dataclasses.replace(manifest, epoch=token.epoch, files=files, prefix=prefix)
    data = stored.to_json()
    key = stored.key_of("manifest.json")
    storage.put(key, data)
    size = sum(file.size for file in files)
    entry = {**document_entry(key, data), "of": _digest(manifest), "seconds": round(seconds, 3), "bytes": size}
    publish_entry(storage, token, _PREFIX + step_name(manifest.step), entry)
    return stored


def _digest(manifest: Manifest) -> str:
    """What tells a checkpoint from one of the same step that a restarted worker group wrote in its place."""
    return hashlib.sha256(manifest.to_json()).hexdigest()


def forget_universal(storage: Storage, token: LeaseToken, step: int) -> None:
    """Take a checkpoint's conversion out of the record; its objects lie under the checkpoint's own folder."""
    name = _PREFIX + step_name(step)
    if name in read_published(storage, token.run_prefix):
        publish_entry(storage, token, name, None)
