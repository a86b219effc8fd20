"""From sources to units: stable slices whose hash covers content and chunking, never the path."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from distill_ray.codec import row_bytes
from distill_ray.config import fingerprint
from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.containers import container_of
from distill_ray.corpus.index import SourceIndex, index_source
from distill_ray.errors import UserError
from distill_ray.schema import DRAW_BYTES, ROW_DRAW_BYTES, SourceSlice, Unit
from distill_ray.storage import ObjectInfo, Storage, glob_sources

CHUNKING_VERSION = 1
"""Raised whenever the same slice would give other sequences."""
_THREADS = 16
_LARGE_GROUP = 2
"""Parquet row groups of more than so many times `unit_bytes` are cut into runs of rows."""
_MOST_OBJECT_BYTES = 2**30
_BYTES_PER_TOKEN = 2
_LARGE_VOCABULARY = 2**18
_SIDE_BYTES = 32
"""Of a target row, beside its packed part: token, mask, actual log-probability and rank, entropy, tails."""

Slice = tuple[str, int, int, int]
"""Kind, start, stop, source bytes."""


def needed_columns(section: CorpusSection) -> tuple[str, ...]:
    """Columns or keys that every record must have."""
    if section.format == "text":
        return (section.text_column,)
    return ("prompt", "completion") if section.format == "prompt_completion" else ("messages",)


def check_columns(section: CorpusSection, uri: str, columns: list[str] | None) -> None:
    """Raises UserError where a source of these columns (None: unknown) cannot be what `corpus.format` says."""
    if container_of(uri) == "txt":
        if section.format != "text":
            raise UserError(
                f'corpus source {uri} is plain text, but corpus.format = "{section.format}"; '
                'use JSONL or Parquet, or format = "text"'
            )
        return
    if columns is None:
        return
    doubled = [column for column in needed_columns(section) if columns.count(column) > 1]
    if doubled:
        raise UserError(f"corpus source {uri} has several columns {doubled}; rename or drop all but one of each")
    missing = [column for column in needed_columns(section) if column not in columns]
    if missing:
        raise UserError(
            f'corpus source {uri}: corpus.format = "{section.format}" needs {missing}, and the first record has '
            f"{columns}; set corpus.text_column or corpus.format, or rename the columns"
        )


def _parquet_slices(unit_bytes: int, index: SourceIndex) -> Iterator[Slice]:
    first, held, row = 0, 0, 0
    for group, (size, rows) in enumerate(zip(index.groups, index.group_rows, strict=True)):
        parts = min(rows, -(-size // unit_bytes)) if size > _LARGE_GROUP * unit_bytes else 1
        if group > first and (held + size > unit_bytes or parts > 1):
            yield "row_groups", first, group, held
            first, held = group, 0
        if parts > 1:
            cuts = [rows * i // parts for i in range(parts + 1)]
            for start, stop in itertools.pairwise(cuts):
                yield "rows", row + start, row + stop, size * (stop - start) // rows
            first = group + 1
        else:
            held += size
        row += rows
    if first < len(index.groups):
        yield "row_groups", first, len(index.groups), held


def _slices(section: CorpusSection, index: SourceIndex, container: str) -> Iterator[Slice]:
    if container == "txt":
        yield "file", 0, index.raw_bytes, index.raw_bytes
    elif container == "parquet":
        yield from _parquet_slices(section.unit_bytes, index)
    else:
        for start, stop in zip(index.cuts, [*index.cuts[1:], index.raw_bytes], strict=False):
            yield "lines", start, stop, stop - start


def most_unit_tokens(top_k: int, draws: int = 0) -> int:
    """Tokens of a unit whose target object is as large as one may be, 1 GiB, all `draws` of a row being distinct."""
    drawn = DRAW_BYTES * draws + ROW_DRAW_BYTES if draws else 0
    return _MOST_OBJECT_BYTES // (row_bytes(top_k, _LARGE_VOCABULARY) + _SIDE_BYTES + drawn)


def most_unit_bytes(section: CorpusSection, top_k: int, draws: int = 0) -> int:
    """Source bytes of a unit beyond which planning refuses it: ordinary text takes 3 to 5 bytes a token, here 2."""
    fresh = (section.window_tokens - section.window_overlap) / section.window_tokens
    return int(most_unit_tokens(top_k, draws) * _BYTES_PER_TOKEN * fresh)


def _kept(top_k: int, draws: int) -> str:
    return f"capture.top_k={top_k}" + (f" and capture.draws={draws}" if draws else "")


def check_unit_bytes(section: CorpusSection, top_k: int, draws: int = 0) -> None:
    """Raises UserError where units of the recipe's own size would already be too large."""
    most = most_unit_bytes(section, top_k, draws)
    if section.unit_bytes > most:
        raise UserError(
            f"corpus.unit_bytes={section.unit_bytes}: with {_kept(top_k, draws)} a unit's target object might "
            f"exceed {_MOST_OBJECT_BYTES:,} bytes; use at most {most // _LARGE_GROUP}"
        )


def _check_size(section: CorpusSection, top_k: int, draws: int, unit: Unit) -> None:
    most = most_unit_bytes(section, top_k, draws)
    if unit.bytes <= most:
        return
    what, remedy = {
        "file": ("a text file is one document", "split the file, or write JSONL with a document on each line"),
        "lines": ("a line is one document", "split its longest document into several lines"),
    }.get(unit.source.kind, ("a row is one document", f"use corpus.unit_bytes = {most // _LARGE_GROUP} or split rows"))
    raise UserError(
        f"corpus source {unit.source.uri}: {unit.source.kind} {unit.source.start} to {unit.source.stop} have "
        f"{unit.bytes:,} bytes, and with {_kept(top_k, draws)} one unit may have {most:,}, so that its target "
        f"object stays below {_MOST_OBJECT_BYTES:,} bytes ({what}); {remedy}"
    )


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


def plan_units(
    section: CorpusSection, tokenizer_id: str, cache: Storage | None, *, top_k: int | None = None, draws: int = 0
) -> list[Unit]:
    """All units of the corpus, sorted by hash; equal content is one unit with a multiplicity.

    Args:
        section: the recipe's [corpus].
        tokenizer_id: `tokenizer_identity` of the teacher's tokenizer.
        cache: root storage, where one small object per source version keeps its hash and layout; None reads all.
        top_k: K of the capture, which bounds the size of a unit; None: not checked.
        draws: draws a row, which bound it too.

    Raises:
        UserError: a source is missing, damaged, of unknown format or without the needed columns, or nothing is in
            them; or a unit's target object might exceed 1 GiB.
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
        check_columns(section, uri, index.columns)
        for unit in _units_of(section, tokenizer_id, uri, sources[uri], index):
            if top_k is not None:
                _check_size(section, top_k, draws, unit)
            known = found.get(unit.hash)
            found[unit.hash] = dataclasses.replace(known, multiplicity=known.multiplicity + 1) if known else unit
    total = sum(unit.bytes for unit in found.values())
    if not total:
        raise UserError(
            f"the corpus is empty: {len(sources)} source(s) match corpus.sources = {list(section.sources)} and hold "
            f"{len(found)} unit(s) of 0 bytes; add text"
        )
    return sorted(found.values(), key=lambda unit: unit.hash)
