"""A first look into the sources: enough to find a wrong extension, column or format before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.beginning import first_records
from distill_ray.corpus.columns import check_columns
from distill_ray.corpus.containers import container_of
from distill_ray.corpus.documents import Document, checked
from distill_ray.errors import UserError
from distill_ray.storage import ObjectInfo

_MOST_SOURCES = 8
_RECORDS = 20
"""Records looked at. Fewer that are all bad are no reason to refuse a source: bad documents become dead letters."""
_MOST_BYTES = 16 * 2**20
"""Uncompressed bytes in which the first lines are sought."""


def probe_sources(section: CorpusSection, sources: Mapping[str, ObjectInfo], prompts: bool = False) -> list[str]:
    """Read the first records of one source for each folder and container, at most 8 sources.

    Returns:
        The sources that were opened.

    Raises:
        UserError: an unknown extension, a damaged source, missing columns, or 20 records of which none can be used.
    """
    chosen: dict[tuple[str, str], str] = {}
    for uri, info in sorted(sources.items()):
        kind = (uri.rpartition("/")[0], container_of(uri))
        if info.size:
            chosen.setdefault(kind, uri)
    opened = list(chosen.values())[:_MOST_SOURCES]
    for uri in opened:
        _probe(section, uri, sources[uri].size, prompts)
    return opened


def _probe(section: CorpusSection, uri: str, size: int, prompts: bool) -> None:
    if container_of(uri) == "txt":
        check_columns(section, uri, None, prompts)
        return
    raw = first_records(section, uri, size, prompts, most_bytes=_MOST_BYTES)
    found = list(islice(checked(raw, section, prompts), _RECORDS))
    refused = [item for item in found if not isinstance(item, Document)]
    if len(refused) == _RECORDS:
        raise UserError(
            f'corpus source {uri}: none of its first {_RECORDS} records can be used with corpus.format = "'
            f'{section.format}"; the first one: {refused[0][1]}; set corpus.format and its columns to what the source '
            "holds, or leave it out"
        )
