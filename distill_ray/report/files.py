"""Where a run's report lies, how it is written under a lease, and how it is read back."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from distill_ray.errors import IntegrityError, LeaseLostError
from distill_ray.lease import LeaseToken, publish, read_published, read_record
from distill_ray.report.document import to_bytes
from distill_ray.report.html import render_html
from distill_ray.storage import ConflictError, NotFoundError, Storage, StorageError

_CONFLICTS = 20


def report_key(run_prefix: str, kind: str = "json") -> str:
    """Key of `report.json` or `report.html`."""
    return f"{run_prefix}/report.{kind}"


def write_report(storage: Storage, token: LeaseToken, report: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Write report.html and report.json and publish them as "report".

    Raises:
        IntegrityError: a value is not finite; nothing is written.
        LeaseLostError: another driver owns the run.
    """
    data, page = to_bytes(report), render_html(report, history).encode()
    _put_owned(storage, token, report_key(token.run_prefix, "html"), page)
    _put_owned(storage, token, report_key(token.run_prefix), data)
    entry = {"key": report_key(token.run_prefix), "sha256": hashlib.sha256(data).hexdigest()}
    publish(storage, token, "report", entry)


def read_report(storage: Storage, run_prefix: str) -> dict[str, Any]:
    """The published report.

    Raises:
        IntegrityError: none is published, or report.json is not the published one.
    """
    entry = read_published(storage, run_prefix).get("report")
    if entry is None:
        raise IntegrityError(f"run {run_prefix} has published no report; run `distill-ray evaluate`")
    try:
        data = storage.get(entry["key"])
    except NotFoundError:
        raise IntegrityError(f"{storage.uri}/{entry['key']} is missing; give a new --version") from None
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise IntegrityError(
            f"{storage.uri}/{entry['key']} has SHA-256 {found[:12]}…, published was {entry['sha256'][:12]}…: altered "
            "after writing; restore it or give a new --version"
        )
    return json.loads(data)


def _put_owned(storage: Storage, token: LeaseToken, key: str, data: bytes) -> None:
    """Write `key` so that a driver that lost its lease cannot overwrite its successor's object.

    The version is read before the ownership: whoever takes over after the check and writes changes the version.
    """
    for _ in range(_CONFLICTS):
        info = storage.head(key)
        record = read_record(storage, token.run_prefix)
        if record is None or (record.epoch, record.owner) != (token.epoch, token.owner):
            raise LeaseLostError(
                f"epoch {token.epoch} of run {token.run_prefix} is over; {key} was not written. Run the same command "
                "again if no other driver does"
            )
        try:
            storage.put_if(key, data, None if info is None else info.version)
            return
        except ConflictError:
            continue
    raise StorageError(f"{storage.uri}/{key}: {_CONFLICTS} writes in a row met another writer's; run again")
