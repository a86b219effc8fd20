"""How many tokens sources hold, from records drawn across each of them; the same records whenever it is asked.

A source is cut into equal parts, and the records that begin in a window in the middle of each part are tokenised as a
capture would. Every record is as likely to be met as any other, however long it is, so tokens by bytes (of Parquet: by
rows) of what was met are those of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_ray.config import Recipe
from distill_ray.corpus.columns import read_columns
from distill_ray.corpus.containers import Decompressor, check_lines, container_of, lines_of, stored_pieces
from distill_ray.corpus.documents import checked, parse_lines, rows_of
from distill_ray.corpus.parquet import layout, rows_at
from distill_ray.corpus.prompts import prompts_of
from distill_ray.corpus.reading import check_tokenizer, held_out, sequences_of
from distill_ray.corpus.refusals import Refusals
from distill_ray.corpus.refused import RefusedDocument
from distill_ray.schema import Amounts, Sequence
from distill_ray.storage import ObjectInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_SOURCES = 64
_WINDOWS = 64
"""Of all sources together, each having one at least."""
_WINDOW_BYTES = 32 * 2**10
_REACH = 64 * 2**20
"""Uncompressed bytes of a compressed source, or of a Parquet row group, that are looked at: neither can be entered in
its middle."""

_Raw = Iterator[dict[str, Any] | RefusedDocument]


@dataclass(frozen=True)
class Sample:
    """What sources hold, as far as the records that were looked at tell."""

    of_source: dict[str, Amounts]
    """By URI, of every source; those not looked into are taken to hold as much for each stored byte as the others."""
    sources: int
    """That were looked into."""
    bytes: int
    """Uncompressed, of the records looked at."""
    refusals: Refusals
    """Among them."""
    whole: bool
    """Whether that was every record."""


@dataclass(frozen=True)
class _Drawn:
    """Records of one source."""

    raw: _Raw
    share: float
    """Of the source that they are; 1: all of it."""
    bytes: int


def sample_sources(recipe: Recipe, sources: Mapping[str, ObjectInfo], tokenizer: PreTrainedTokenizerBase) -> Sample:
    """Tokenise records of up to 64 of the sources, some 4 MiB in all.

    In mode "generate" every completion counts as long as it may be.

    Args:
        recipe: format, windows, holdout; how prompts are answered.
        sources: by URI.
        tokenizer: the teacher's.

    Raises:
        UserError: a source is damaged, or the tokenizer lacks what the format needs.
    """
    filled = [uri for uri in sorted(sources) if sources[uri].size]
    chosen = filled[:: -(-len(filled) // _MOST_SOURCES) or 1]
    total = sum(sources[uri].size for uri in chosen)
    found, read, whole = dict[str, Amounts](), 0, len(chosen) == len(filled)
    taken, reasons = 0, list[str]()
    for uri in chosen:
        size = sources[uri].size
        drawn = _draw(recipe, uri, size, max(1, round(_WINDOWS * size / total)))
        read += drawn.bytes
        used, refused = _read(recipe, drawn, tokenizer)
        sequences = [sequence for document in used for sequence in document]
        found[uri] = _counted(recipe, drawn, sequences).times(1 / drawn.share if drawn.share else 0.0)
        taken += len(used)
        reasons += refused
        whole &= drawn.share == 1
    each = sum(found.values(), Amounts()).times(1 / total if total else 0.0)
    others = {uri: each.times(info.size) for uri, info in sources.items() if uri not in found}
    return Sample(found | others, len(chosen), read, Refusals.of(taken, reasons), whole)


def _read(recipe: Recipe, drawn: _Drawn, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[Sequence]], list[str]]:
    """The sequences of each document, completions not counted, and why others have none."""
    section, generate = recipe.corpus, recipe.capture.generate
    check_tokenizer(tokenizer, section, generate is not None)
    documents = checked(drawn.raw, section, generate is not None)
    if generate is None:
        read = list(sequences_of(documents, section, tokenizer))
        used = [found for found in read if isinstance(found, list)]
    else:
        read = list(prompts_of(documents, section, generate, tokenizer))
        used = [[found] * generate.samples for found in read if isinstance(found, Sequence)]
    return used, [found[1] for found in read if isinstance(found, tuple)]


def _counted(recipe: Recipe, drawn: _Drawn, sequences: list[Sequence]) -> Amounts:
    section, generate = recipe.corpus, recipe.capture.generate
    extra = generate.max_tokens if generate else 0
    if not sequences:
        return Amounts()
    counts = np.array([(len(s.tokens) + extra, int(s.loss_mask.sum()) + extra) for s in sequences])
    tokens, supervised = counts.sum(axis=0).tolist()
    if drawn.share < 1:
        # Few documents say less of which side others fall on than the share that the recipe states.
        trains = 1 - section.holdout
        return Amounts(tokens, len(sequences), supervised, tokens * trains, supervised * trains)
    kept = ~held_out(np.array([s.doc_key for s in sequences], np.uint64), section.holdout)
    return Amounts(tokens, len(sequences), supervised, *counts[kept].sum(axis=0).tolist())


def _draw(recipe: Recipe, uri: str, size: int, windows: int) -> _Drawn:
    container, section = container_of(uri), recipe.corpus
    if container == "parquet":
        return _rows(uri, windows, read_columns(section, recipe.capture.generate is not None))
    if container == "txt":
        return _pieces(uri, size, windows, section.text_column)
    if container == "jsonl":
        check_lines(uri, next(stored_pieces(uri, 0, min(size, _WINDOW_BYTES)), b""))
        return _lines(lambda begin: stored_pieces(uri, begin, size, _WINDOW_BYTES), size, size, windows)
    text, whole = _beginning(uri, size)
    check_lines(uri, text[:_WINDOW_BYTES])
    return _lines(lambda begin: iter([text[begin:]]), len(text), whole, windows)


def _spans(size: int, windows: int, width: int) -> list[tuple[int, int]]:
    """[start, stop) of windows in the middles of equal parts; one of everything where they would touch."""
    if windows * width >= size:
        return [(0, size)]
    starts = (size * (2 * i + 1) // (2 * windows) - width // 2 for i in range(windows))
    return [(start, start + width) for start in starts]


def _lines(read: Callable[[int], Iterator[bytes]], size: int, whole: int, windows: int) -> _Drawn:
    """Lines of the first `size` bytes of a text of `whole` bytes."""
    spans = _spans(size, windows, _WINDOW_BYTES)
    lines = [line for a, b in spans for line in lines_of(read(max(0, a - 1)), max(0, a - 1), a, b)]
    if not lines:  # every window lies inside a longer line
        lines = lines_of(read(0), 0, 0, 1)
    length = sum(len(line) + 1 for line in lines)
    all_of_it = spans[0][1] == size == whole
    lines[:1] = [line.removeprefix(b"\xef\xbb\xbf") for line in lines[:1]]
    return _Drawn(parse_lines(lines), 1.0 if all_of_it else min(1.0, length / whole), length)


def _beginning(uri: str, size: int) -> tuple[bytes, int]:
    """The first uncompressed bytes of a compressed source, and how many there are in all, reckoned where not all were
    read."""
    decompressor, text, read = Decompressor(uri), bytearray(), 0
    for stored in stored_pieces(uri, 0, size, 2**18):
        read += len(stored)
        for piece in decompressor.feed(stored):
            text += piece
        if len(text) >= _REACH:
            break
    if read == size:
        decompressor.finish()
        return bytes(text), len(text)
    return bytes(text[: text.rfind(b"\n") + 1]), round(len(text) * size / read)


def _pieces(uri: str, size: int, windows: int, column: str) -> _Drawn:
    """Pieces of a text file, which is one document."""
    spans = _spans(size, windows, _WINDOW_BYTES)
    # A window may begin and end inside a character.
    found = [b"".join(stored_pieces(uri, a, b)).decode("utf-8", "ignore") for a, b in spans]
    read = sum(b - a for a, b in spans)
    return _Drawn(({column: text} for text in found), read / size, read)


def _rows(uri: str, windows: int, columns: tuple[str, ...]) -> _Drawn:
    _, groups, group_rows = layout(uri)
    rows, size = sum(group_rows), sum(groups)
    if not rows:
        return _Drawn(iter(()), 1.0, 0)
    spans = _spans(rows, windows, max(1, round(_WINDOW_BYTES * rows / max(size, 1))))
    share = sum(b - a for a, b in spans) / rows
    return _Drawn(rows_of(uri, rows_at(uri, spans, columns, _REACH)), share, round(size * share))
