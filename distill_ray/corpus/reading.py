"""From a unit to the sequences that the teacher scores and the student trains on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.chat import Encoded, encode_chat
from distill_ray.corpus.documents import Document, read_documents
from distill_ray.corpus.messages import Chat
from distill_ray.corpus.refused import RefusedDocument
from distill_ray.corpus.tokenizers import opened, opening_of, opens_with, plain_ids, stop_ids
from distill_ray.corpus.turns import Continued, ended
from distill_ray.corpus.windows import windows
from distill_ray.errors import UserError
from distill_ray.schema import DeadLetter, Sequence, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256
"""Documents tokenised by one call, which spreads them over the cores."""


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], end: int | None) -> Iterator[Encoded]:
    """Each text behind what opens one and, unless it is there already, with this token at its end."""
    opening = opening_of(tokenizer)
    for ids in plain_ids(tokenizer, texts):
        closing = [end] if end is not None and ids[-1:] != [end] else []
        tokens = np.asarray(opened(ids, opening) + closing, dtype=np.int32)
        yield tokens, np.ones(len(tokens), dtype=bool)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text that something is to follow."""
    return opened(plain_ids(tokenizer, [prompt])[0], opening_of(tokenizer))


def _encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """Prompt and completion, which ends where the teacher stops."""
    head, tail = Continued(tokenizer).split(prompt, completion)
    head, tail = opened(head, opening_of(tokenizer)), ended(tokenizer, tail)
    tokens = np.asarray(head + tail, dtype=np.int32)
    return tokens, np.arange(len(tokens)) >= len(head)


def _encode(
    tokenizer: PreTrainedTokenizerBase, section: CorpusSection, documents: list[Document]
) -> Iterator[list[Encoded] | RefusedDocument]:
    if section.format == "text" and documents:  # The tokenizer breaks on an empty batch.
        end = stop_ids(tokenizer)[0] if section.text_eos else None
        texts = [cast(str, document.content) for document in documents]
        yield from ([each] for each in _encode_texts(tokenizer, texts, end))
        return
    for document in documents:
        try:
            if section.format == "prompt_completion":
                found = [_encode_pair(tokenizer, *cast(tuple[str, str], document.content))]
            else:
                found = encode_chat(tokenizer, cast(Chat, document.content), section.chat_template_kwargs)
            if (longest := max(len(tokens) for tokens, _ in found)) > section.window_tokens:
                raise RefusedDocument(
                    f"{longest} tokens with its prompt, more than corpus.window_tokens={section.window_tokens}: what "
                    "lies beyond would be learned without what it answers"
                )
            yield found
        except RefusedDocument as reason:
            yield reason
        except RecursionError:
            yield RefusedDocument("nested too deeply")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, section: CorpusSection, prompts: bool = False) -> None:
    """Raises UserError where the tokenizer lacks what the format needs."""
    form, opening = section.format, opening_of(tokenizer)
    if not prompts and not stop_ids(tokenizer) and (form != "text" or section.text_eos):
        other = ", or corpus.text_eos = false" if form == "text" else ""
        raise UserError(
            f'corpus.format = "{form}" ends what is learned with eos, and neither the tokenizer nor the model states '
            f"one; state eos_token in tokenizer_config.json{other}"
        )
    if len(opening) + section.window_overlap >= section.window_tokens:
        raise UserError(
            f"corpus.window_tokens={section.window_tokens} leaves nothing beside the {len(opening)} token(s) that the "
            f"tokenizer opens every window with and window_overlap={section.window_overlap}; raise it"
        )
    if form == "messages":
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f'corpus.format = "messages", but the tokenizer has no usable chat template ({error}); '
                "add chat_template.jinja to the teacher's folder or use another format"
            ) from None


def sequences_of(
    documents: Iterator[Document | tuple[int, RefusedDocument]],
    section: CorpusSection,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[list[Sequence] | tuple[int, str]]:
    """The sequences of each document, or its number and why it has none; refused ones come before others near them."""
    opening = opening_of(tokenizer)
    while batch := list(islice(documents, _BATCH)):
        yield from ((item[0], str(item[1])) for item in batch if not isinstance(item, Document))
        good = [item for item in batch if isinstance(item, Document)]
        for document, encoded in zip(good, _encode(tokenizer, section, good), strict=True):
            if isinstance(encoded, RefusedDocument):
                yield document.record, str(encoded)
                continue
            found = list[Sequence]()
            for ids, supervised in encoded:
                opened = len(opening) if opens_with(ids, opening) else 0
                found += windows(ids, supervised, document.key, section.window_tokens, section.window_overlap, opened)
            yield found or (document.record, f"{len(encoded[0][0])} token(s): nothing to predict")


def read_unit_sequences(
    unit: Unit, section: CorpusSection, tokenizer: PreTrainedTokenizerBase, *, most_tokens: int | None = None
) -> tuple[list[Sequence], list[DeadLetter]]:
    """All sequences of a unit in source order, and the documents that failed for their own reasons.

    Args:
        unit: one of `plan_units`.
        section: the recipe's [corpus], as it was planned with.
        tokenizer: the teacher's, from `load_tokenizer`.
        most_tokens: bound on the tokens of all sequences together (`most_unit_tokens`); None: no bound.

    Raises:
        UserError: the source is gone, changed since it was planned, or the tokenizer lacks what the format needs; or
            there are more than `most_tokens`.
    """
    check_tokenizer(tokenizer, section)
    sequences: list[Sequence] = []
    refused: list[tuple[int, str]] = []
    tokens = 0
    for found in sequences_of(read_documents(unit, section), section, tokenizer):
        if isinstance(found, tuple):
            refused.append(found)
            continue
        sequences += found
        tokens += sum(len(s.tokens) for s in found)
        if most_tokens is not None and tokens > most_tokens:
            # Planning knows bytes alone, and those of a Parquet dictionary may stand for many times as much text.
            raise UserError(
                f"corpus source {unit.source.uri}: {unit.source.kind} {unit.source.start} to {unit.source.stop} give "
                f"more than {most_tokens:,} tokens in one unit, whose target object would exceed 1 GiB; lower "
                f"corpus.unit_bytes={section.unit_bytes}"
            )
    return sequences, [DeadLetter(unit.hash, unit.source.uri, number, reason) for number, reason in sorted(refused)]


def held_out(doc_keys: np.ndarray, holdout: float) -> np.ndarray:
    """Which documents are kept out of training: those whose key lies in the lowest `holdout` of the 64-bit range.

    Args:
        doc_keys: [S] uint64, one for each sequence; windows of one document share theirs, and so their side.
        holdout: share of documents, 0 to 0.5.

    Returns:
        [S] bool.
    """
    bound = np.uint64(min(int(holdout * 2.0**64), 2**64 - 1))
    return np.asarray(doc_keys, dtype=np.uint64) < bound
