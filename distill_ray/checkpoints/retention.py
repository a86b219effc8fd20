"""Which checkpoints stay, and for how long."""

from __future__ import annotations

import math
from typing import Any

from distill_ray.checkpoints.manifest import PUBLISHED_PREFIX, published_checkpoints, step_name
from distill_ray.checkpoints.universal import forget_universal
from distill_ray.lease import LeaseToken
from distill_ray.lease import publish as publish_entry
from distill_ray.storage import Storage


def prune(storage: Storage, token: LeaseToken, *, keep: int, multiples_of: int = 0) -> list[int]:
    """Drop all but the newest `keep` checkpoints, the best one and every so many-th, and folders no record names.

    A checkpoint is taken out of the lease record before its first object is deleted, so a kill in between leaves
    garbage, never a broken checkpoint. Folders of this lease's own epoch are left alone: one may be in flight.

    Args:
        storage: the run's store.
        token: of the run's lease.
        keep: number of newest checkpoints that stay.
        multiples_of: steps that are a multiple of it stay, too; 0: none.

    Returns:
        Steps dropped.

    Raises:
        LeaseLostError: another driver owns the run.
    """
    entries = published_checkpoints(storage, token.run_prefix)
    steps = sorted(entries)
    kept = {*steps[-keep:], *_best(entries), *(s for s in steps if multiples_of and s % multiples_of == 0)}
    dropped = [s for s in steps if s not in kept]
    for step in dropped:
        publish_entry(storage, token, PUBLISHED_PREFIX + step_name(step), None)
        forget_universal(storage, token, step)
        _delete_folder(storage, _folder(entries[step]))
    _sweep(storage, token, {_folder(entries[s]) for s in kept})
    return dropped


def release(storage: Storage, token: LeaseToken) -> None:
    """Take all checkpoints out of the lease record: `gc` removes their objects, as it does what nobody refers to.

    Raises:
        LeaseLostError: another driver owns the run.
    """
    for step in published_checkpoints(storage, token.run_prefix):
        publish_entry(storage, token, PUBLISHED_PREFIX + step_name(step), None)
        forget_universal(storage, token, step)


def _best(entries: dict[int, dict[str, Any]]) -> list[int]:
    finite = [s for s, e in entries.items() if math.isfinite(e["loss"])]
    return [min(finite, key=lambda s: (entries[s]["loss"], -s))] if finite else []


def _folder(entry: dict[str, Any]) -> str:
    return str(entry["key"]).rpartition("/")[0]


def _sweep(storage: Storage, token: LeaseToken, named: set[str]) -> None:
    root = f"{token.run_prefix}/checkpoints/"
    for info in list(storage.list(root)):
        parts = info.key.removeprefix(root).split("/")
        if len(parts) < 3:  # not ours: a console's or a person's file
            continue
        step, epoch = parts[:2]
        folder, epoch = f"{root}{step}/{epoch}", epoch.removeprefix("e")
        if folder not in named and epoch.isdigit() and int(epoch) < token.epoch:
            storage.delete(info.key)


def _delete_folder(storage: Storage, folder: str) -> None:
    for info in list(storage.list(folder + "/")):
        storage.delete(info.key)
