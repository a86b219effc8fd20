"""From a unit to the prompts that the teacher answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import numpy as np

from distill_ray.config.generate import GenerateSection
from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.chat import encode_chat_prompt
from distill_ray.corpus.documents import Document, read_documents
from distill_ray.corpus.messages import Chat
from distill_ray.corpus.reading import check_tokenizer, encode_prompt
from distill_ray.corpus.refused import RefusedDocument
from distill_ray.errors import UserError
from distill_ray.schema import DeadLetter, Sequence, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_unit_prompts(
    unit: Unit,
    section: CorpusSection,
    generate: GenerateSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    most_tokens: int | None = None,
) -> tuple[list[Sequence], list[DeadLetter]]:
    """All prompts of a unit in source order, nothing of them supervised, and the documents that are none.

    A prompt is never cut: one that leaves no room for `generate.max_tokens` in the window is a dead letter.

    Args:
        unit: one of `plan_units(…, prompts=True)`.
        section: the recipe's [corpus], as it was planned with.
        generate: how they will be answered.
        tokenizer: the teacher's.
        most_tokens: bound on the tokens of all completions with their prompts (`most_unit_tokens`); None: no bound.

    Raises:
        UserError: the source is gone, changed since it was planned, or the tokenizer lacks what the format needs; or
            there may be more than `most_tokens`.
    """
    check_tokenizer(tokenizer, section, prompts=True)
    prompts, dead = list[Sequence](), list[DeadLetter]()
    tokens = 0
    for found in prompts_of(read_documents(unit, section, prompts=True), section, generate, tokenizer):
        if isinstance(found, Sequence):
            prompts.append(found)
            tokens += generate.samples * (len(found.tokens) + generate.max_tokens)
        else:
            dead.append(DeadLetter(unit.hash, unit.source.uri, *found))
    if most_tokens is not None and tokens > most_tokens:
        raise UserError(
            f"corpus source {unit.source.uri}: {unit.source.kind} {unit.source.start} to {unit.source.stop} hold "
            f"{len(prompts):,} prompts, whose {generate.samples} completion(s) of up to {generate.max_tokens:,} tokens "
            f"each may come to {tokens:,} tokens in one unit, and its target object must stay below 1 GiB, "
            f"{most_tokens:,} tokens; lower corpus.unit_bytes={section.unit_bytes}"
        )
    return prompts, dead


def prompts_of(
    documents: Iterator[Document | tuple[int, RefusedDocument]],
    section: CorpusSection,
    generate: GenerateSection,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Sequence | tuple[int, str]]:
    """The prompt of each document, or its number and why it is none."""
    room = section.window_tokens - generate.max_tokens
    for item in documents:
        try:
            if not isinstance(item, Document):
                raise item[1]
            ids = _fitting(_encode(tokenizer, item, section), room, section, generate)
        except RefusedDocument as reason:
            yield item.record if isinstance(item, Document) else item[0], str(reason)
            continue
        yield Sequence(ids, np.zeros(len(ids), bool), item.key)


def _encode(tokenizer: PreTrainedTokenizerBase, document: Document, section: CorpusSection) -> list[int]:
    if isinstance(document.content, Chat):
        return encode_chat_prompt(tokenizer, document.content, section.chat_template_kwargs)
    return encode_prompt(tokenizer, cast(str, document.content))


def _fitting(ids: list[int], room: int, section: CorpusSection, generate: GenerateSection) -> np.ndarray:
    if not ids:
        raise RefusedDocument("empty: the prompt has no tokens")
    if len(ids) > room:
        raise RefusedDocument(
            f"a prompt of {len(ids)} tokens leaves no room for capture.generate.max_tokens={generate.max_tokens} in "
            f"corpus.window_tokens={section.window_tokens}; it may have {room}"
        )
    return np.asarray(ids, np.int32)
