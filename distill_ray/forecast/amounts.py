"""What the corpus comes to: units captured already, counted exactly, and the rest from a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distill_ray import corpus, targets
from distill_ray.config import Recipe
from distill_ray.errors import UserError
from distill_ray.ingest import check_mix
from distill_ray.schema import Amounts
from distill_ray.storage import ObjectInfo, Storage, find_sources
from distill_ray.targets import CaptureIdentity
from distill_ray.units import hashes_of, in_sorted, places_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CorpusAmounts:
    """What capture and training work on."""

    new: Amounts
    """To be captured."""
    new_bytes: int
    """Stored bytes of what is to be captured."""
    captured_tokens: int
    """Of units that are captured already."""
    epoch: Amounts
    """Of one epoch, captured or not, each source as often as `train.mix` says; only its training side counts."""
    sources: int
    bytes: int
    """Stored bytes of all sources."""
    sample: corpus.Sample
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Known:
    """What of one source cache and index tell; of a source that is not cached, nothing."""

    new: float = 1.0
    """Share of its bytes that is still to be captured, each content once."""
    taken: float = 1.0
    """The same with every occurrence, as training takes it."""
    trained: Amounts = field(default_factory=Amounts)
    """Captured ones, with every occurrence; only their training side counts."""


def corpus_amounts(
    recipe: Recipe, storage: Storage, tokenizer: PreTrainedTokenizerBase, identity: CaptureIdentity | None
) -> CorpusAmounts:
    """Count and sample.

    Args:
        recipe: the corpus, its mix and its holdout.
        storage: the recipe's root.
        tokenizer: the teacher's.
        identity: the capture; None where it is not known: all of the corpus then counts as not captured.
    """
    sources = find_sources(recipe.corpus.sources)
    weights, notes = check_mix(recipe.train.mix, sources), list[str]()
    known, captured = dict[str, _Known](), 0
    if identity is None:
        notes.append("what is captured already is not known before the teacher's weights are hashed: all counts as new")
    else:
        known, captured = _known(recipe, storage, identity, sources, notes)
    unread = {uri: info for uri, info in sources.items() if known.get(uri, _Known()).new > 0}
    sample = corpus.sample_sources(recipe, unread, tokenizer)
    _check_refusals(recipe, sample, notes)
    new, epoch = Amounts(), Amounts()
    for uri in sources:
        about, whole = known.get(uri, _Known()), sample.of_source.get(uri, Amounts())
        new += whole.times(about.new)
        epoch += (about.trained + whole.times(about.taken)).times(weights[uri])
    size = sum(info.size for info in sources.values())
    fresh = round(sum(info.size * known.get(uri, _Known()).new for uri, info in unread.items()))
    return CorpusAmounts(new, fresh, captured, epoch, len(sources), size, sample, tuple(notes))


def _check_refusals(recipe: Recipe, sample: corpus.Sample, notes: list[str]) -> None:
    found, bound = sample.refusals, recipe.capture.max_refused
    among = "the corpus" if sample.whole else f"a sample of {sample.sources} source(s)"
    if found.beyond(bound, of_all=sample.whole):
        raise UserError(
            f"{among}: {found}. capture.max_refused={bound:g} allows fewer; mend them or the recipe, or raise it"
        )
    if found.refused:
        notes.append(f"{among}: {found}")


def _known(
    recipe: Recipe, storage: Storage, identity: CaptureIdentity, sources: Mapping[str, ObjectInfo], notes: list[str]
) -> tuple[dict[str, _Known], int]:
    """Of each cached source, and the tokens of all captured units."""
    units, sizes = corpus.known_units(
        recipe.corpus, identity.tokenizer, storage, sources, prompts=identity.generate is not None
    )
    fresh = sum(info.size > 0 for info in sources.values()) - sum(size > 0 for size in sizes)
    if fresh and sizes:
        notes.append(f"{fresh} source(s) were never read: units that repeat in them count each time")
    columns = ("lengths", "supervised", "doc_keys")
    table, _ = targets.load_table(storage, identity, only=units.hashes, columns=columns, report=notes.append)
    done = hashes_of(table["unit"])
    source_U, times_U = units.rows["source"], units.rows["multiplicity"]
    new_U = units.rows["bytes"] * ~in_sorted(done, units.hashes)
    # One entry a captured sequence.
    unit_S = np.repeat(places_in(units.hashes, done)[0], table["lengths"].combine_chunks().value_lengths().to_numpy())
    length_S, supervised_S, key_S = (table[name].combine_chunks().flatten().to_numpy() for name in columns)
    trains_S = ~corpus.held_out(key_S, recipe.corpus.holdout) * times_U[unit_S]

    def by_source(source: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.bincount(source, weights, minlength=len(sizes))

    new, taken = by_source(source_U, new_U), by_source(source_U, new_U * times_U)
    tokens, supervised = (by_source(source_U[unit_S], of_S * trains_S) for of_S in (length_S, supervised_S))
    found = {
        source.uri: _Known(
            new[i] / max(sizes[i], 1),
            taken[i] / max(sizes[i], 1),
            Amounts(train_tokens=float(tokens[i]), train_supervised=float(supervised[i])),
        )
        for i, source in enumerate(units.sources)
    }
    return found, int(length_S.sum())
