"""From a unit's bytes to documents; what is wrong with one document stays with that document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.columns import needed_columns, read_columns
from distill_ray.corpus.containers import locate, read_lines, stored_pieces
from distill_ray.corpus.messages import Chat, chat_of
from distill_ray.corpus.parquet import batches, readable
from distill_ray.corpus.refused import RefusedDocument
from distill_ray.errors import UserError
from distill_ray.schema import SourceSlice, Unit
from distill_ray.storage import ObjectInfo

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Document:
    """One record of the corpus, checked."""

    record: int
    """0-based record number in the slice."""
    key: int
    """First 8 bytes of BLAKE2b over format and content: the same document has the same key wherever it lies."""
    content: str | tuple[str, str] | Chat
    """Text, or (prompt, completion), or a chat."""


def _current(unit: Unit) -> ObjectInfo:
    """The unit's source object as it is now; UserError where it is gone or not what the run was planned with."""
    uri, planned = unit.source.uri, unit.source.version
    store, key = locate(uri)
    info = store.head(key)
    if info is None:
        raise UserError(f"corpus source {uri} is gone since the run was planned; put it back or run again")
    if planned and planned != info.version:
        raise UserError(
            f"corpus source {uri} changed since the run was planned (version {planned}, now {info.version}, "
            f"{info.size:,} bytes); run again to plan it anew"
        )
    return info


def _parse_line(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise RefusedDocument("empty: the line is blank")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RefusedDocument(f"not UTF-8: byte {line[error.start]:#04x} at offset {error.start}") from None
    except ValueError as error:  # also a number of more digits than Python converts
        raise RefusedDocument(f"bad JSON: {error}") from None
    except RecursionError:
        raise RefusedDocument("bad JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise RefusedDocument(f"bad JSON: a {type(record).__name__}, not an object")
    return record


def _raw_lines(unit: Unit, size: int) -> Iterator[dict[str, Any] | RefusedDocument]:
    lines = read_lines(unit.source.uri, size, unit.source.start, unit.source.stop, unit.source.content)
    if lines and unit.source.start == 0:
        lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    yield from parse_lines(lines)


def parse_lines(lines: list[bytes]) -> Iterator[dict[str, Any] | RefusedDocument]:
    """The record of each JSONL line, or why there is none."""
    for line in lines:
        try:
            yield _parse_line(line)
        except RefusedDocument as reason:
            yield reason


def _row(batch: pa.RecordBatch, row: int) -> dict[str, Any] | RefusedDocument:
    try:
        return {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        return RefusedDocument(f"not UTF-8: {error.reason} at offset {error.start}")


def raw_rows(source: SourceSlice, columns: tuple[str, ...]) -> Iterator[dict[str, Any] | RefusedDocument]:
    """The records of a Parquet slice, those of these columns alone that it has."""
    yield from rows_of(source.uri, batches(source, columns))


def rows_of(uri: str, found: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any] | RefusedDocument]:
    """The records of batches of a Parquet source."""
    for batch in found:
        for row in range(batch.num_rows):
            with readable(uri, "is damaged"):
                record = _row(batch, row)
            yield record


def _raw_file(unit: Unit, size: int, column: str) -> Iterator[dict[str, Any] | RefusedDocument]:
    yield text_record(b"".join(stored_pieces(unit.source.uri, 0, size)), column)


def text_record(data: bytes, column: str) -> dict[str, Any] | RefusedDocument:
    """A text file as the one record that it is."""
    try:
        return {column: data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return RefusedDocument(f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start}")


def _text_of(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise RefusedDocument(f"key {key!r} is missing; the record has {list(record)[:20]}")
    value = record[key]
    if not isinstance(value, str):
        raise RefusedDocument(f"{key!r} is {type(value).__name__}, not text")
    return value


def _prompt_of(record: dict[str, Any], section: CorpusSection) -> str | Chat:
    """What the teacher is to answer. Of a chat, all up to the last turn that is not the assistant's."""
    if section.format == "messages":
        chat = chat_of(record, section)
        while chat.messages and chat.messages[-1]["role"] == "assistant":
            chat.messages.pop()
        if not any(message["role"] == "user" for message in chat.messages):
            raise RefusedDocument("no turn to answer: no message is the user's")
        return replace(chat, unlearned=())
    text = _text_of(record, needed_columns(section, True)[0])
    if not text.strip():
        raise RefusedDocument("empty: no prompt")
    return text


def _content_of(record: dict[str, Any], section: CorpusSection) -> str | tuple[str, str] | Chat:
    if section.format == "text":
        text = _text_of(record, section.text_column)
        if not text.strip():
            raise RefusedDocument("empty: no text")
        return text
    if section.format == "messages":
        return chat_of(record, section)
    prompt, completion = (_text_of(record, name) for name in needed_columns(section))
    if not completion:
        raise RefusedDocument("empty: the completion has no text")
    return prompt, completion


def document_key(form: str, content: Any) -> int:
    """64-bit hash of a document's canonical content; unsalted, so the same in every process.

    Raises:
        RefusedDocument: the content is not text that UTF-8 can hold (a lone surrogate from a JSON escape).
    """
    try:
        canonical = json.dumps([form, content], sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise RefusedDocument(f"not UTF-8: lone surrogate in {error.object[error.start]!a}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RefusedDocument(f"not plain JSON: {error}") from None
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "big")


def checked(
    raw: Iterable[dict[str, Any] | RefusedDocument], section: CorpusSection, prompts: bool = False
) -> Iterator[Document | tuple[int, RefusedDocument]]:
    """The document, or prompt, of each record, numbered from 0; a refused one is (number, reason)."""
    for number, record in enumerate(raw):
        if isinstance(record, RefusedDocument):
            yield number, record
            continue
        try:
            content = _prompt_of(record, section) if prompts else _content_of(record, section)
            canonical = content.canonical() if isinstance(content, Chat) else content
            yield Document(number, document_key(section.format, canonical), content)
        except RefusedDocument as reason:
            yield number, reason


def read_documents(
    unit: Unit, section: CorpusSection, prompts: bool = False
) -> Iterator[Document | tuple[int, RefusedDocument]]:
    """The documents, or prompts, of a unit in source order; a refused one is (record number, reason).

    What was given out counts only once the iterator is exhausted: a source that is replaced while it is read shows at
    the end.

    Raises:
        UserError: the source is gone, changed since it was planned, changed while it was read, or is damaged.
    """
    info = _current(unit)
    if unit.source.kind in ("row_groups", "rows"):
        raw = raw_rows(unit.source, read_columns(section, prompts))
    elif unit.source.kind == "file":
        raw = _raw_file(unit, info.size, section.text_column)
    else:
        raw = _raw_lines(unit, info.size)
    yield from checked(raw, section, prompts)
    # Pieces of two versions would be stored for ever under the hash of the first.
    if _current(unit).version != info.version:
        raise UserError(f"corpus source {unit.source.uri} changed while it was read; run again when it is whole")
