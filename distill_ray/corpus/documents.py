"""From a unit's bytes to documents; what is wrong with one document stays with that document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.containers import locate, read_lines, stored_pieces
from distill_ray.corpus.parquet import batches, readable
from distill_ray.corpus.units import needed_columns
from distill_ray.errors import UserError
from distill_ray.schema import SourceSlice, Unit
from distill_ray.storage import ObjectInfo

if TYPE_CHECKING:
    import pyarrow as pa


class RefusedDocument(ValueError):
    """A document that fails for its own reasons; becomes a dead letter and never leaves this package."""


@dataclass(frozen=True)
class Document:
    """One record of the corpus, checked."""

    record: int
    """0-based record number in the slice."""
    key: int
    """First 8 bytes of BLAKE2b over format and content: the same document has the same key wherever it lies."""
    content: str | tuple[str, str] | list[dict[str, Any]]
    """Text, or (prompt, completion), or messages."""


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


def _row(batch: pa.RecordBatch, row: int, columns: tuple[str, ...]) -> dict[str, Any] | RefusedDocument:
    try:
        return {name: batch.column(name)[row].as_py() for name in columns}
    except UnicodeDecodeError as error:
        return RefusedDocument(f"not UTF-8: {error.reason} at offset {error.start}")


def raw_rows(source: SourceSlice, columns: tuple[str, ...]) -> Iterator[dict[str, Any] | RefusedDocument]:
    """The records of a Parquet slice, these columns alone."""
    yield from rows_of(source.uri, batches(source, list(columns)), columns)


def rows_of(
    uri: str, found: Iterable[pa.RecordBatch], columns: tuple[str, ...]
) -> Iterator[dict[str, Any] | RefusedDocument]:
    """The records of batches of a Parquet source, these columns alone."""
    for batch in found:
        for row in range(batch.num_rows):
            with readable(uri, "is damaged"):
                record = _row(batch, row, columns)
            yield record


def _raw_file(unit: Unit, size: int, column: str) -> Iterator[dict[str, Any] | RefusedDocument]:
    data = b"".join(stored_pieces(unit.source.uri, 0, size))
    try:
        yield {column: data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield RefusedDocument(f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start}")


def _text_of(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise RefusedDocument(f"key {key!r} is missing; the record has {list(record)[:20]}")
    value = record[key]
    if not isinstance(value, str):
        raise RefusedDocument(f"{key!r} is {type(value).__name__}, not text")
    return value


def _messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" not in record:
        raise RefusedDocument(f"key 'messages' is missing; the record has {list(record)[:20]}")
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RefusedDocument("'messages' is not a list of {role, content}")
    if not messages:
        raise RefusedDocument("empty: no messages")
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                kind = type(message.get(key)).__name__
                raise RefusedDocument(f"message {number}: {key!r} is {kind}, not text")
    # Parquet fills the keys that a message lacks with nulls; JSONL leaves them out.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _prompt_of(record: dict[str, Any], section: CorpusSection) -> str | list[dict[str, Any]]:
    """What the teacher is to answer. Of a chat, all up to the last turn that is not the assistant's."""
    if section.format == "messages":
        messages = _messages_of(record)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise RefusedDocument("no turn to answer: every message is the assistant's")
        return messages
    text = _text_of(record, section.text_column if section.format == "text" else "prompt")
    if not text.strip():
        raise RefusedDocument("empty: no prompt")
    return text


def _content_of(record: dict[str, Any], section: CorpusSection) -> str | tuple[str, str] | list[dict[str, Any]]:
    if section.format == "text":
        text = _text_of(record, section.text_column)
        if not text.strip():
            raise RefusedDocument("empty: no text")
        return text
    if section.format == "prompt_completion":
        prompt, completion = _text_of(record, "prompt"), _text_of(record, "completion")
        if not completion:
            raise RefusedDocument("empty: the completion has no text")
        return prompt, completion
    return _messages_of(record)


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
            yield Document(number, document_key(section.format, content), content)
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
        raw = raw_rows(unit.source, needed_columns(section, prompts))
    elif unit.source.kind == "file":
        raw = _raw_file(unit, info.size, section.text_column)
    else:
        raw = _raw_lines(unit, info.size)
    yield from checked(raw, section, prompts)
    # Pieces of two versions would be stored for ever under the hash of the first.
    if _current(unit).version != info.version:
        raise UserError(f"corpus source {unit.source.uri} changed while it was read; run again when it is whole")
