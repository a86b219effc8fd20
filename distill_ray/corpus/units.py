"""From sources to units: stable slices whose hash covers content and chunking, never the path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from distill_ray.config import fingerprint
from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.containers import container_of
from distill_ray.corpus.index import SourceIndex, index_source
from distill_ray.errors import UserError
from distill_ray.schema import SourceSlice, Unit
from distill_ray.storage import ObjectInfo, Storage, glob_sources

CHUNKING_VERSION = 1
"""Raised whenever the same slice would give other sequences."""
_THREADS = 16


def needed_columns(section: CorpusSection) -> tuple[str, ...]:
    """Columns or keys that every record must have."""
    if section.format == "text":
        return (section.text_column,)
    return ("prompt", "completion") if section.format == "prompt_completion" else ("messages",)


def _check_columns(section: CorpusSection, uri: str, index: SourceIndex) -> None:
    if container_of(uri) == "txt":
        if section.format != "text":
            raise UserError(
                f'corpus source {uri} is plain text, but corpus.format = "{section.format}"; '
                'use JSONL or Parquet, or format = "text"'
            )
        return
    if index.columns is None:
        return
    missing = [column for column in needed_columns(section) if column not in index.columns]
    if missing:
        raise UserError(
            f'corpus source {uri}: corpus.format = "{section.format}" needs {missing}, and the first record has '
            f"{index.columns}; set corpus.text_column or corpus.format, or rename the columns"
        )


def _slices(section: CorpusSection, index: SourceIndex, container: str) -> Iterator[tuple[str, int, int, int]]:
    """(kind, start, stop, source bytes) of each slice of one source."""
    if container == "txt":
        yield "file", 0, index.raw_bytes, index.raw_bytes
    elif container == "parquet":
        first, held = 0, 0
        for group, size in enumerate(index.groups):
            if group > first and held + size > section.unit_bytes:
                yield "row_groups", first, group, held
                first, held = group, 0
            held += size
        if index.groups:
            yield "row_groups", first, len(index.groups), held
    else:
        for start, stop in zip(index.cuts, [*index.cuts[1:], index.raw_bytes], strict=False):
            yield "lines", start, stop, stop - start


def _units_of(
    section: CorpusSection, tokenizer_id: str, uri: str, info: ObjectInfo, index: SourceIndex
) -> Iterator[Unit]:
    container = container_of(uri)
    for kind, start, stop, size in _slices(section, index, container):
        identity = {
            "chunking": CHUNKING_VERSION,
            "container": container,
            "content": index.sha256,
            "slice": [kind, start, stop],
            "tokenizer": tokenizer_id,
            "format": section.format,
            "text_column": section.text_column if section.format == "text" and container != "txt" else None,
            "window_tokens": section.window_tokens,
            "window_overlap": section.window_overlap,
            "unit_bytes": section.unit_bytes,
        }
        source = SourceSlice(uri, index.sha256, kind, start, stop, info.version)
        yield Unit(fingerprint(identity), source, size)


def plan_units(section: CorpusSection, tokenizer_id: str, cache: Storage | None) -> list[Unit]:
    """All units of the corpus, sorted by hash; equal content is one unit with a multiplicity.

    Args:
        section: the recipe's [corpus].
        tokenizer_id: `tokenizer_identity` of the teacher's tokenizer.
        cache: root storage, where one small object per source version keeps its hash and layout; None reads all.

    Raises:
        UserError: a source is missing, damaged, of unknown format or without the needed columns, or nothing is in them.
    """
    # A file that two globs name is one source; two files with the same bytes are a multiplicity of 2.
    sources = {uri: info for pattern in section.sources for uri, info in glob_sources(pattern)}
    for uri in sources:
        container_of(uri)
    with ThreadPoolExecutor(min(_THREADS, max(1, len(sources)))) as pool:
        pending = {
            uri: pool.submit(index_source, uri, info, section.unit_bytes, cache) for uri, info in sources.items()
        }
        indices = {uri: future.result() for uri, future in pending.items()}
    found: dict[str, Unit] = {}
    for uri, index in sorted(indices.items()):
        _check_columns(section, uri, index)
        for unit in _units_of(section, tokenizer_id, uri, sources[uri], index):
            known = found.get(unit.hash)
            found[unit.hash] = dataclasses.replace(known, multiplicity=known.multiplicity + 1) if known else unit
    total = sum(unit.bytes for unit in found.values())
    if not total:
        raise UserError(
            f"the corpus is empty: {len(sources)} source(s) match corpus.sources = {list(section.sources)} and hold "
            f"{len(found)} unit(s) of 0 bytes; add text"
        )
    return sorted(found.values(), key=lambda unit: unit.hash)
