"""From sources to units: stable slices whose hash covers content and chunking, never the path."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from distill_ray.codec import row_bytes
from distill_ray.config import canonical_json
from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.columns import check_columns
from distill_ray.corpus.containers import container_of
from distill_ray.corpus.index import SourceIndex, cached_index, index_source
from distill_ray.errors import UserError
from distill_ray.forgotten import Withdrawn, read_forgotten
from distill_ray.schema import DRAW_BYTES, ROW_DRAW_BYTES
from distill_ray.storage import ObjectInfo, Storage, find_sources
from distill_ray.units import KINDS, ROW, Source, Units

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


def _too_large(section: CorpusSection, top_k: int, draws: int, uri: str, piece: Slice) -> UserError:
    most = most_unit_bytes(section, top_k, draws)
    kind, start, stop, size = piece
    what, remedy = {
        "file": ("a text file is one document", "split the file, or write JSONL with a document on each line"),
        "lines": ("a line is one document", "split its longest document into several lines"),
    }.get(kind, ("a row is one document", f"use corpus.unit_bytes = {most // _LARGE_GROUP} or split rows"))
    return UserError(
        f"corpus source {uri}: {kind} {start} to {stop} have {size:,} bytes, and with {_kept(top_k, draws)} one unit "
        f"may have {most:,}, so that its target object stays below {_MOST_OBJECT_BYTES:,} bytes ({what}); {remedy}"
    )


def _reading(section: CorpusSection, prompts: bool) -> dict[str, Any]:
    """How documents are read now, as far as they were once read otherwise: units from before still stand if not."""
    if section.format == "text":
        return {} if prompts or not section.text_eos else {"eos": True}
    columns = {"columns": section.columns} if section.columns else {}
    if section.format == "prompt_completion":
        return columns if prompts else {"whole": True} | columns
    kwargs = {"chat_template_kwargs": section.chat_template_kwargs} if section.chat_template_kwargs else {}
    return {"chats": "as served"} | columns | kwargs


def _hasher(
    section: CorpusSection, tokenizer_id: str, container: str, content: str, prompts: bool
) -> Callable[[Slice], str]:
    """Slice of one source → `fingerprint` of everything that decides its sequences.

    A million units of a few thousand sources differ in their slice alone: what is around it is written once a source.
    """
    hole = "\0"
    text = canonical_json(
        {
            "chunking": CHUNKING_VERSION,
            "container": container,
            "content": content,
            "slice": hole,
            "tokenizer": tokenizer_id,
            "format": section.format,
            "text_column": section.text_column if section.format == "text" and container != "txt" else None,
            "window_tokens": section.window_tokens,
            "window_overlap": section.window_overlap,
            "unit_bytes": section.unit_bytes,
        }
        # Left out otherwise, so that the units from before there were prompts still stand.
        | ({"prompts": True} if prompts else {})
        | _reading(section, prompts)
    )
    before, _, after = text.partition(json.dumps(hole))

    def hash_of(piece: Slice) -> str:
        kind, start, stop, _ = piece
        return hashlib.sha256(f'{before}["{kind}",{start},{stop}]{after}'.encode()).hexdigest()[:32]

    return hash_of


def _refuse(uri: str, withdrawn: Withdrawn) -> None:
    day = time.strftime("%Y-%m-%d", time.gmtime(withdrawn.at))
    raise UserError(
        f"corpus source {uri} holds content that was withdrawn on {day} (`distill-ray gc --forget`, then known at "
        f"{', '.join(withdrawn.uris) or 'no place'}): it is not captured again; delete it, or leave it out of "
        "corpus.sources"
    )


def _indices(
    section: CorpusSection, sources: Mapping[str, ObjectInfo], cache: Storage | None, cached_only: bool
) -> Iterator[tuple[str, SourceIndex]]:
    """The index of each source, in the order of their URIs; only those that are ahead of the caller are held."""
    with ThreadPoolExecutor(min(_THREADS, max(1, len(sources)))) as pool:
        uris = sorted(sources)

        def one(uri: str) -> SourceIndex:
            return index_source(uri, sources[uri], section.unit_bytes, cache, cached_only=cached_only)

        yield from zip(uris, pool.map(one, uris), strict=True)


def known_units(
    section: CorpusSection,
    tokenizer_id: str,
    cache: Storage,
    sources: Mapping[str, ObjectInfo],
    *,
    prompts: bool = False,
) -> tuple[Units, list[int]]:
    """The units, as `plan_units` gives them, of those sources alone whose index is in the cache; no source is read.

    Beside them the bytes of each of their `sources` before compression.

    Args:
        section: the recipe's [corpus].
        tokenizer_id: `tokenizer_identity` of the teacher's tokenizer.
        cache: root storage.
        sources: by URI.
        prompts: the corpus holds prompts for the teacher to answer.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        indices = pool.map(
            lambda uri: cached_index(uri, sources[uri], section.unit_bytes, cache), uris := sorted(sources)
        )
        known = [(uri, index) for uri, index in zip(uris, indices, strict=True) if index is not None]
    rows = [
        (hash_of(piece), place, KINDS.index(piece[0]), *piece[1:], 1)
        for place, (uri, index) in enumerate(known)
        for hash_of in (_hasher(section, tokenizer_id, container_of(uri), index.sha256, prompts),)
        for piece in _slices(section, index, container_of(uri))
    ]
    of = tuple(Source(uri, index.sha256, sources[uri].version) for uri, index in known)
    return Units.merged(np.array(rows, ROW), of), [index.raw_bytes for _, index in known]


def plan_units(
    section: CorpusSection,
    tokenizer_id: str,
    cache: Storage | None,
    *,
    top_k: int | None = None,
    draws: int = 0,
    cached_only: bool = False,
    prompts: bool = False,
) -> Units:
    """All units of the corpus, sorted by hash; equal content is one unit with a multiplicity.

    Args:
        section: the recipe's [corpus].
        tokenizer_id: `tokenizer_identity` of the teacher's tokenizer.
        cache: root storage, where one small object per source version keeps its hash and layout; None reads all.
        top_k: K of the capture, which bounds the size of a unit; None: not checked.
        draws: draws a row, which bound it too.
        cached_only: refuse a source that is not in the cache rather than read it.
        prompts: the corpus holds prompts for the teacher to answer.

    Raises:
        UserError: a source is missing, damaged, of unknown format or without the needed columns, or nothing is in
            them; a unit's target object might exceed 1 GiB; or a source holds withdrawn content.
    """
    # A file that two globs name is one source; two files with the same bytes are a multiplicity of 2.
    infos = find_sources(section.sources)
    for uri in infos:
        container_of(uri)
    sources: list[Source] = []
    withdrawn = read_forgotten(cache).contents if cache else {}
    most = 0 if top_k is None else most_unit_bytes(section, top_k, draws)

    def rows() -> Iterator[tuple[Any, ...]]:
        for uri, index in _indices(section, infos, cache, cached_only):
            if index.sha256 in withdrawn:
                _refuse(uri, withdrawn[index.sha256])
            check_columns(section, uri, index.columns, prompts)
            sources.append(Source(uri, index.sha256, infos[uri].version))
            container = container_of(uri)
            hash_of = _hasher(section, tokenizer_id, container, index.sha256, prompts)
            for piece in _slices(section, index, container):
                kind, start, stop, size = piece
                if top_k is not None and size > most:
                    raise _too_large(section, top_k, draws, uri, piece)
                yield hash_of(piece), len(sources) - 1, KINDS.index(kind), start, stop, size, 1

    units = Units.merged(np.fromiter(rows(), ROW), tuple(sources))
    if not units.rows["bytes"].any():
        raise UserError(
            f"the corpus is empty: {len(infos)} source(s) match corpus.sources = {list(section.sources)} and hold "
            f"{len(units)} unit(s) of 0 bytes; add text"
        )
    return units
