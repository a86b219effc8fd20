"""From a unit's bytes to documents; what is wrong with one document stays with that document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.containers import locate, read_lines, stored_pieces
from distill_ray.corpus.units import needed_columns
from distill_ray.errors import UserError
from distill_ray.schema import Unit

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 1024


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


def _check_unchanged(unit: Unit, version: str, size: int) -> None:
    if unit.source.version and unit.source.version != version:
        raise UserError(
            f"corpus source {unit.source.uri} changed since the run was planned (version {unit.source.version}, now "
            f"{version}, {size:,} bytes); run again to plan it anew"
        )


def _parse_line(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise RefusedDocument("empty: the line is blank")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RefusedDocument(f"not UTF-8: byte {line[error.start]:#04x} at offset {error.start}") from None
    except json.JSONDecodeError as error:
        raise RefusedDocument(f"bad JSON: {error}") from None
    except RecursionError:
        raise RefusedDocument("bad JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise RefusedDocument(f"bad JSON: a {type(record).__name__}, not an object")
    return record


def _raw_lines(unit: Unit, size: int) -> Iterator[dict[str, Any] | RefusedDocument]:
    lines = read_lines(unit.source.uri, size, unit.source.start, unit.source.stop)
    if lines and unit.source.start == 0:
        lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    for line in lines:
        try:
            yield _parse_line(line)
        except RefusedDocument as reason:
            yield reason


def _batches(unit: Unit, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    store, key = locate(unit.source.uri)
    groups = list(range(unit.source.start, unit.source.stop))
    with store.open_input(key) as stream:
        try:
            file = pq.ParquetFile(stream)
            yield from file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"corpus source {unit.source.uri} is damaged: {error}; upload it again") from None


def _raw_rows(unit: Unit, columns: tuple[str, ...]) -> Iterator[dict[str, Any] | RefusedDocument]:
    for batch in _batches(unit, columns):
        for row in range(batch.num_rows):
            try:
                yield {name: batch.column(name)[row].as_py() for name in columns}
            except UnicodeDecodeError as error:
                yield RefusedDocument(f"not UTF-8: {error.reason} at offset {error.start}")


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
    except (TypeError, ValueError) as error:
        raise RefusedDocument(f"not plain JSON: {error}") from None
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "big")


def read_documents(unit: Unit, section: CorpusSection) -> Iterator[Document | tuple[int, RefusedDocument]]:
    """The documents of a unit in source order; a refused one is (record number, reason).

    Raises:
        UserError: the source is gone or changed since it was planned.
    """
    store, key = locate(unit.source.uri)
    info = store.head(key)
    if info is None:
        raise UserError(f"corpus source {unit.source.uri} is gone since the run was planned; put it back or run again")
    _check_unchanged(unit, info.version, info.size)
    if unit.source.kind == "row_groups":
        raw = _raw_rows(unit, needed_columns(section))
    elif unit.source.kind == "file":
        raw = _raw_file(unit, info.size, section.text_column)
    else:
        raw = _raw_lines(unit, info.size)
    for number, record in enumerate(raw):
        if isinstance(record, RefusedDocument):
            yield number, record
            continue
        try:
            content = _content_of(record, section)
            yield Document(number, document_key(section.format, content), content)
        except RefusedDocument as reason:
            yield number, reason
