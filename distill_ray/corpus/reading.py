"""From a unit to the sequences that the teacher scores and the student trains on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.chat import encode_chat
from distill_ray.corpus.documents import Document, RefusedDocument, read_documents
from distill_ray.corpus.windows import windows
from distill_ray.errors import UserError
from distill_ray.schema import DeadLetter, Sequence, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256
"""Documents tokenised by one call, which spreads them over the cores."""

Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids [n] int32 and supervision [n] bool."""


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[Encoded]:
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    for ids in encoded["input_ids"]:
        tokens = np.asarray(ids, dtype=np.int32)
        yield tokens, np.ones(len(tokens), dtype=bool)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text that something is to follow."""
    encoded = tokenizer(prompt, return_special_tokens_mask=True, verbose=False)
    head, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    # A tokenizer that ends every text with eos would end the prompt there too.
    while head and added[len(head) - 1] and head[-1] == tokenizer.eos_token_id:
        head.pop()
    return head


def _encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """Prompt, completion and eos, each tokenised apart, as they are when the student is asked."""
    head = encode_prompt(tokenizer, prompt)
    tail = [*tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    tokens = np.asarray(head + tail, dtype=np.int32)
    return tokens, np.arange(len(tokens)) >= len(head)


def _encode(
    tokenizer: PreTrainedTokenizerBase, form: str, documents: list[Document]
) -> Iterator[Encoded | RefusedDocument]:
    if form == "text" and documents:  # The tokenizer breaks on an empty batch.
        yield from _encode_texts(tokenizer, [cast(str, document.content) for document in documents])
        return
    for document in documents:
        try:
            if form == "prompt_completion":
                yield _encode_pair(tokenizer, *cast(tuple[str, str], document.content))
            else:
                yield encode_chat(tokenizer, cast(list[dict[str, Any]], document.content))
        except RefusedDocument as reason:
            yield reason


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, form: str, prompts: bool = False) -> None:
    """Raises UserError where the tokenizer lacks what the format needs."""
    if form == "prompt_completion" and not prompts and tokenizer.eos_token_id is None:
        raise UserError(
            'corpus.format = "prompt_completion" ends each completion with eos, and the tokenizer has none; '
            "state eos_token in its tokenizer_config.json"
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
    while batch := list(islice(documents, _BATCH)):
        yield from ((item[0], str(item[1])) for item in batch if not isinstance(item, Document))
        good = [item for item in batch if isinstance(item, Document)]
        for document, encoded in zip(good, _encode(tokenizer, section.format, good), strict=True):
            if isinstance(encoded, RefusedDocument):
                yield document.record, str(encoded)
            elif len(encoded[0]) < 2:
                yield document.record, f"{len(encoded[0])} token(s): nothing to predict"
            else:
                yield windows(*encoded, document.key, section.window_tokens, section.window_overlap)


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
    check_tokenizer(tokenizer, section.format)
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
