"""Where a run's report lies, how it is written under a lease, and how it is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distill_ray.errors import IntegrityError
from distill_ray.lease import LeaseToken, document_entry, publish, put_owned, read_document, read_published
from distill_ray.report.document import SCHEMA_VERSION, to_bytes
from distill_ray.report.html import render_html
from distill_ray.storage import Storage


def report_key(run_prefix: str, kind: str = "json") -> str:
    """Key of `report.json` or `report.html`."""
    return f"{run_prefix}/report.{kind}"


def write_report(
    storage: Storage,
    token: LeaseToken,
    report: dict[str, Any],
    history: list[dict[str, float]],
    *,
    settings: dict[str, Any],
    require: dict[str, Any],
    links: Mapping[str, Any] | None = None,
) -> None:
    """Write report.html and report.json and publish them as "report".

    Args:
        storage: the run's root.
        token: of the run's lease.
        report: as `build_report` gives it.
        history: training steps, for the loss curve.
        settings: identity fields of `[evaluate]`; published, so that others are seen to need another report.
        require: bounds the report was judged by; published for the same reason.
        links: further fields of the published entry.

    Raises:
        IntegrityError: a value is not finite; nothing is written.
        LeaseLostError: another driver owns the run.
    """
    data, page = to_bytes(report), render_html(report, history).encode()
    put_owned(storage, token, report_key(token.run_prefix, "html"), page)
    put_owned(storage, token, report_key(token.run_prefix), data)
    of = {"student": report["identity"]["student"], "settings": settings, "require": require, **(links or {})}
    of["page"] = document_entry(report_key(token.run_prefix, "html"), page)
    entry = document_entry(report_key(token.run_prefix), data) | {"schema_version": SCHEMA_VERSION}
    publish(storage, token, "report", entry | of)


def page_damage(storage: Storage, entry: Mapping[str, Any]) -> str | None:
    """Why the page of a published report has to be written anew; None where it stands."""
    try:
        read_document(storage, entry["page"], "it is written anew")
    except IntegrityError as error:
        return str(error)
    return None


def read_report(storage: Storage, run_prefix: str) -> dict[str, Any]:
    """The published report.

    Raises:
        IntegrityError: none is published, or report.json is not the published one.
    """
    entry = read_published(storage, run_prefix).get("report")
    if entry is None:
        raise IntegrityError(f"run {run_prefix} has published no report; run `distill-ray evaluate`")
    return json.loads(read_document(storage, entry, "run `distill-ray evaluate` again to write it anew"))
