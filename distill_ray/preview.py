"""What a corpus becomes, shown without Ray, a model or money: every sequence, and which of its tokens are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from distill_ray import corpus
from distill_ray.config import Recipe
from distill_ray.errors import UserError
from distill_ray.schema import Amounts, Sequence
from distill_ray.storage import find_sources, stage_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLOUR, _PLAIN = ("\x1b[32m", "\x1b[0m"), ("⟦", "⟧")
"""Around what is learned, on a terminal and elsewhere."""


def preview(recipe: Recipe, documents: int, *, as_json: bool, colour: bool) -> Iterator[str]:
    """Lines to print: the first documents of the sources, then what a sample drawn across each source comes to.

    Args:
        recipe: its corpus, and the folder of its teacher, of which the tokenizer alone is read.
        documents: how many are shown.
        as_json: one JSON object for each sequence or refused document, and no summary.
        colour: mark what is learned by colour.

    Raises:
        UserError: what `check` finds wrong with the sources, or there are none.
    """
    if documents < 1:
        raise UserError(f"--documents {documents}: state 1 or more")
    folder = stage_folder(recipe.teacher.model, weights=False)
    tokenizer = corpus.load_tokenizer(folder, recipe.teacher.trust_remote_code)
    sources = find_sources(recipe.corpus.sources)
    for seen in corpus.first_documents(recipe, sources, tokenizer, documents):
        if as_json:
            yield from (json.dumps(each, ensure_ascii=False) for each in _objects(recipe, tokenizer, seen))
        else:
            yield from _shown(recipe, tokenizer, seen, _COLOUR if colour else _PLAIN)
    if not as_json:
        yield _summary(recipe, corpus.sample_sources(recipe, sources, tokenizer))


def _objects(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seen: corpus.Seen) -> Iterator[dict[str, Any]]:
    about = {"source": seen.source, "record": seen.record}
    if seen.refused:
        yield about | {"refused": seen.refused}
    for sequence in seen.sequences:
        yield about | {
            "held_out": _is_held_out(recipe, sequence),
            "ids": sequence.tokens.tolist(),
            "supervised": sequence.loss_mask.tolist(),
            "text": _text(tokenizer, sequence.tokens),
        }


def _shown(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seen: corpus.Seen, marks: tuple[str, str]
) -> Iterator[str]:
    yield f"{seen.source}, record {seen.record}" + (f": refused: {seen.refused}" if seen.refused else "")
    for number, sequence in enumerate(seen.sequences, 1):
        side = "held out" if _is_held_out(recipe, sequence) else "trained on"
        yield (
            f"  sequence {number} of {len(seen.sequences)}, {side}: {len(sequence.tokens):,} tokens, "
            f"{int(sequence.loss_mask.sum()):,} learned"
        )
        yield _marked(tokenizer, sequence, marks)


def _marked(tokenizer: PreTrainedTokenizerBase, sequence: Sequence, marks: tuple[str, str]) -> str:
    found, at = "", 0
    for learned, run in groupby(sequence.loss_mask.tolist()):
        stop = at + len(list(run))
        text = _text(tokenizer, sequence.tokens[at:stop])
        found += f"{marks[0]}{text}{marks[1]}" if learned else text
        at = stop
    return found


def _summary(recipe: Recipe, sample: corpus.Sample) -> str:
    amounts = sum(sample.of_source.values(), Amounts())
    about = "in all" if sample.whole else f"about, from {sample.bytes:,} bytes of {sample.sources:,} source(s)"
    allowed = f"; capture.max_refused={recipe.capture.max_refused:g}" if sample.refusals.refused else ""
    return (
        f"{about}: {amounts.sequences:,.0f} sequences, {amounts.tokens:,.0f} tokens, {amounts.supervised:,.0f} learned"
        f"; {sample.refusals}{allowed}"
    )


def _is_held_out(recipe: Recipe, sequence: Sequence) -> bool:
    return bool(corpus.held_out(np.array([sequence.doc_key], np.uint64), recipe.corpus.holdout)[0])


def _text(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return cast(str, tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
