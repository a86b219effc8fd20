"""The records of a source in order, from its beginning, as many as are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.columns import check_columns, read_columns
from distill_ray.corpus.containers import check_lines, container_of, uncompressed_pieces
from distill_ray.corpus.documents import parse_lines, raw_rows, text_record
from distill_ray.corpus.index import columns_of_line
from distill_ray.corpus.parquet import layout
from distill_ray.corpus.refused import RefusedDocument
from distill_ray.schema import SourceSlice


def first_records(
    section: CorpusSection, uri: str, size: int, prompts: bool = False, *, most_bytes: int | None = None
) -> Iterator[dict[str, Any] | RefusedDocument]:
    """The record of each line, row or file, or why there is none; what is not asked for is not read.

    Args:
        section: format and columns.
        uri: the source.
        size: its stored bytes.
        prompts: whether the records are prompts.
        most_bytes: uncompressed bytes of a source of lines beyond which it is taken to end; None: its own end.

    Raises:
        UserError: the extension is unknown, the source is damaged or a JSON array, or it lacks a column.
    """
    container = container_of(uri)
    if container == "parquet":
        yield from _rows(section, uri, prompts)
    elif container == "txt":
        check_columns(section, uri, None, prompts)
        yield text_record(b"".join(uncompressed_pieces(uri, size)), section.text_column)
    else:
        yield from _lines(section, uri, size, prompts, most_bytes)


def _rows(section: CorpusSection, uri: str, prompts: bool) -> Iterator[dict[str, Any] | RefusedDocument]:
    columns, _, rows = layout(uri)
    check_columns(section, uri, columns, prompts)
    for group in range(len(rows)):
        yield from raw_rows(SourceSlice(uri, "", "row_groups", group, group + 1), read_columns(section, prompts))


def _lines(
    section: CorpusSection, uri: str, size: int, prompts: bool, most_bytes: int | None
) -> Iterator[dict[str, Any] | RefusedDocument]:
    for number, line in enumerate(_split(uri, size, most_bytes)):
        if number == 0:
            check_lines(uri, line)
            check_columns(section, uri, columns_of_line(line), prompts)
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield from parse_lines([line])


def _split(uri: str, size: int, most_bytes: int | None) -> Iterator[bytes]:
    buffer, read = bytearray(), 0
    for piece in uncompressed_pieces(uri, size):
        read += len(piece)
        *whole, rest = piece.split(b"\n")
        for line in whole:
            yield bytes(buffer + line)
            buffer.clear()
        buffer += rest
        if most_bytes is not None and read > most_bytes:
            return
    if buffer:
        yield bytes(buffer)
