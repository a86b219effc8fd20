"""Moving shards: every rank uploads its own, one rank publishes, every rank downloads and verifies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from distill_ray.checkpoints.manifest import PUBLISHED_PREFIX, Manifest, StoredFile, folder_key, step_name
from distill_ray.checkpoints.moving import at_once, store_file
from distill_ray.errors import IntegrityError
from distill_ray.lease import LeaseToken, document_entry
from distill_ray.lease import publish as publish_entry
from distill_ray.storage import NotFoundError, Storage, download_verified


def upload(storage: Storage, token: LeaseToken, step: int, paths: Iterable[Path]) -> list[StoredFile]:
    """Store one rank's files of a checkpoint, several at once; they count only once `publish` names them."""
    prefix = folder_key(token.run_prefix, step, token.epoch)
    return at_once(partial(store_file, storage, prefix), [(path.name, path) for path in paths])


def publish(
    storage: Storage,
    token: LeaseToken,
    step: int,
    files: Sequence[StoredFile],
    *,
    loss: float,
    world_size: int,
    zero_stage: int,
    plan: str,
) -> Manifest:
    """Write the manifest over all ranks' files and publish it against the lease; called by one rank, last.

    Raises:
        LeaseLostError: another driver took the run over; nothing was published.
        IntegrityError: two ranks wrote a file of the same name.
    """
    names = [f.name for f in files]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise IntegrityError(f"checkpoint of step {step}: several ranks wrote {', '.join(twice)}")
    prefix = folder_key(token.run_prefix, step, token.epoch)
    manifest = Manifest(step, token.epoch, loss, world_size, zero_stage, plan, tuple(files), prefix)
    data = manifest.to_json()
    key = manifest.key_of("manifest.json")
    storage.put(key, data)
    entry = {
        **document_entry(key, data),
        "step": step,
        "loss": loss,
        "world_size": world_size,
        "zero_stage": zero_stage,
        "plan": plan,
    }
    publish_entry(storage, token, PUBLISHED_PREFIX + step_name(step), entry)
    return manifest


def restore(storage: Storage, manifest: Manifest, names: Iterable[str], folder: Path) -> Path:
    """Download the named files into `folder`, several at once, and verify every one, before anything reads them.

    Raises:
        IntegrityError: a file is missing, unknown, short or altered. None of them may then be unpickled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {f.name: f for f in manifest.files}

    def bring(name: str) -> None:
        file = known.get(name)
        if file is None:
            raise IntegrityError(f"checkpoint of step {manifest.step} has no file {name}")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(storage, manifest, file, path)

    at_once(bring, names)
    return folder


def _fetch(storage: Storage, manifest: Manifest, file: StoredFile, path: Path) -> None:
    try:
        found = download_verified(storage, manifest.key_of(file.name), path, file.sha256)
    except NotFoundError:
        raise IntegrityError(f"checkpoint of step {manifest.step}: {file.name} is missing") from None
    if found != file.sha256:
        size = path.stat().st_size
        path.unlink()
        raise IntegrityError(
            f"checkpoint of step {manifest.step}: {file.name} has {size} bytes and SHA-256 {found[:12]}…, but its "
            f"manifest says {file.size} and {file.sha256[:12]}…"
        )
