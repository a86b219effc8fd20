"""Which columns or keys of a source hold its documents."""

from __future__ import annotations

from collections.abc import Sequence

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.containers import container_of
from distill_ray.errors import UserError


def named(section: CorpusSection, name: str) -> str:
    """The source's name of one of the columns that a format knows."""
    return section.columns.get(name, name)


def messages_column(section: CorpusSection, has: Sequence[str]) -> str:
    """The column with messages, of those that a source or record has: ShareGPT's `conversations` where it is alone."""
    name = named(section, "messages")
    return "conversations" if name == "messages" and "messages" not in has and "conversations" in has else name


def needed_columns(section: CorpusSection, prompts: bool = False, has: Sequence[str] = ()) -> tuple[str, ...]:
    """Those that every record must have; of `prompts`, those that the teacher is to answer."""
    if section.format == "text":
        return (section.text_column,)
    if section.format == "messages":
        return (messages_column(section, has),)
    return tuple(named(section, name) for name in ("prompt", "completion")[: 1 if prompts else 2])


def read_columns(section: CorpusSection, prompts: bool = False) -> tuple[str, ...]:
    """Those that are read where a source has them."""
    if section.format != "messages":
        return needed_columns(section, prompts)
    either = dict.fromkeys((named(section, "messages"), messages_column(section, ["conversations"])))
    return (*either, *(named(section, name) for name in ("tools", "documents", "system")))


def check_columns(section: CorpusSection, uri: str, columns: list[str] | None, prompts: bool = False) -> None:
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
    doubled = [column for column in read_columns(section, prompts) if columns.count(column) > 1]
    if doubled:
        raise UserError(f"corpus source {uri} has several columns {doubled}; rename or drop all but one of each")
    missing = [column for column in needed_columns(section, prompts, columns) if column not in columns]
    if missing:
        raise UserError(
            f'corpus source {uri}: corpus.format = "{section.format}" needs {missing}, and the first record has '
            f"{columns}; set corpus.text_column, corpus.columns or corpus.format"
        )
