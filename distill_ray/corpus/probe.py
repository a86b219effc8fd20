"""A first look into the sources: enough to find a wrong extension, column or format before anything is spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.containers import container_of, uncompressed_pieces
from distill_ray.corpus.documents import Document, RefusedDocument, checked, parse_lines, raw_rows
from distill_ray.corpus.index import columns_of_line
from distill_ray.corpus.parquet import layout
from distill_ray.corpus.units import check_columns, needed_columns
from distill_ray.errors import UserError
from distill_ray.schema import SourceSlice
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
    container = container_of(uri)
    raw: Iterable[dict[str, Any] | RefusedDocument] = ()
    if container == "parquet":
        columns, _, rows = layout(uri)
        check_columns(section, uri, columns, prompts)
        if sum(rows):
            first = SourceSlice(uri, "", "rows", 0, min(_RECORDS, next(n for n in rows if n)))
            raw = raw_rows(first, needed_columns(section, prompts))
    elif container == "txt":
        check_columns(section, uri, None, prompts)
    else:
        lines = _first_lines(uri, size)
        check_columns(section, uri, columns_of_line(lines[0]) if lines else None, prompts)
        raw = parse_lines(lines)
    found = list(islice(checked(raw, section, prompts), _RECORDS))
    refused = [item for item in found if not isinstance(item, Document)]
    if len(refused) == _RECORDS:
        raise UserError(
            f'corpus source {uri}: none of its first {_RECORDS} records can be used with corpus.format = "'
            f'{section.format}"; the first one: {refused[0][1]}; set corpus.format and its columns to what the source '
            "holds, or leave it out"
        )


def _first_lines(uri: str, size: int) -> list[bytes]:
    buffer = bytearray()
    for piece in uncompressed_pieces(uri, size):
        buffer += piece
        if buffer.count(b"\n") >= _RECORDS or len(buffer) > _MOST_BYTES:
            return bytes(buffer).split(b"\n")[:-1]
    return bytes(buffer).removesuffix(b"\n").split(b"\n")
