"""The first documents of a corpus, each with what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_ray.config import Recipe
from distill_ray.corpus.beginning import first_records
from distill_ray.corpus.documents import checked
from distill_ray.corpus.prompts import prompts_of
from distill_ray.corpus.reading import check_tokenizer, sequences_of
from distill_ray.schema import Sequence
from distill_ray.storage import ObjectInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seen:
    """One record."""

    source: str
    record: int
    """0-based, in its source."""
    sequences: tuple[Sequence, ...]
    """In order: windows, or the turns of a chat that share no sequence; a prompt supervises nothing."""
    refused: str
    """Why there is none; else empty."""


def first_documents(
    recipe: Recipe, sources: Mapping[str, ObjectInfo], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Seen]:
    """So many records, taken from the beginnings of all sources in turn; by source.

    Raises:
        UserError: a source is damaged or lacks a column, or the tokenizer lacks what the format needs.
    """
    check_tokenizer(tokenizer, recipe.corpus, recipe.capture.generate is not None)
    filled = [uri for uri in sorted(sources) if sources[uri].size][:count]
    open_ones = [_seen(recipe, uri, sources[uri].size, tokenizer) for uri in filled]
    found: list[Seen] = []
    while open_ones and len(found) < count:
        taken = [(each, seen) for each in open_ones[: count - len(found)] if (seen := next(each, None)) is not None]
        found += [seen for _, seen in taken]
        if len(found) < count:
            open_ones = [each for each, _ in taken]
    return sorted(found, key=lambda seen: (seen.source, seen.record))


def _seen(recipe: Recipe, uri: str, size: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Seen]:
    section, generate = recipe.corpus, recipe.capture.generate
    prompts = generate is not None
    for record, item in enumerate(checked(first_records(section, uri, size, prompts), section, prompts)):
        one = iter([item])
        read = (
            next(sequences_of(one, section, tokenizer))
            if generate is None
            else next(prompts_of(one, section, generate, tokenizer))
        )
        if isinstance(read, tuple):
            yield Seen(uri, record, (), read[1])
        else:
            yield Seen(uri, record, tuple(read) if isinstance(read, list) else (read,), "")
