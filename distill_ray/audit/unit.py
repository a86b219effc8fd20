"""The audit of one unit: what needs no teacher for all of it, and some of its sequences scored again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distill_ray import corpus, targets, teacher
from distill_ray.audit.drawn import check_draws_fall
from distill_ray.audit.pair import Difference
from distill_ray.audit.rows import compare_rows
from distill_ray.audit.source import check_alignment, compare_completion, compare_source
from distill_ray.audit.tolerance import Tolerance
from distill_ray.config import Recipe
from distill_ray.schema import TargetRows, Unit
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity, StoredSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scorer = Callable[[list[np.ndarray]], list[TargetRows | str] | None]
"""`Engine.score_again`."""

Places = tuple[int, ...]
"""Of sequences, in the stored order of their unit."""

Found = tuple[int, Difference]
"""A sequence of a unit, and where it differs."""


@dataclass(frozen=True)
class SequenceFigures:
    """What scoring some sequences of a unit again gave; counts end at the first difference."""

    rows: int = 0
    worst: float = 0.0
    """Largest difference of a log-probability beyond the codec's rounding, in nats."""
    worst_at: tuple[int, int] = (0, 0)
    """Its sequence and row."""
    moved_mass: float = 0.0
    """Sum over rows of the total variation distance."""
    difference: Found | None = None


def open_scorer(recipe: Recipe, identity: CaptureIdentity, engine: str) -> Scorer:
    """Load the teacher in this process, by a path that capture inside vLLM's workers shares nothing with.

    Args:
        recipe: of the run.
        identity: of its capture.
        engine: "vllm" for the public path (no temperatures but 1, no entropy), "transformers" for the dense reference.

    Raises:
        UserError: the engine cannot load this teacher.
    """
    section = recipe.teacher.model_copy(update={"engine": engine})
    # Nothing is drawn again: the public path cannot, and a stored draw is judged by its log-probability.
    scored = {"mode": "score", "generate": None, "draws": 0, "draws_from": "all", "draws_temperature": 1.0}
    scored["temperatures"] = identity.temperatures if engine == "transformers" else (1.0,)
    capture = recipe.capture.model_copy(update=scored)
    return teacher.open_engine(section, capture, recipe.corpus.window_tokens, path="flat").score_again


def check_unit(
    storage: Storage,
    identity: CaptureIdentity,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    unit: Unit,
    object_sha256: str,
) -> Found | None:
    """Compare all sequences of a unit with its source, tokenised again, and their rows with their own tokens and draws.

    Args:
        storage: where the object lies.
        identity: of the capture.
        recipe: of the run.
        tokenizer: the teacher's.
        unit: as the corpus is planned now: it says where the source lies.
        object_sha256: of the object, as the run's manifest has it.

    Raises:
        IntegrityError: the object is not the one that the manifest recorded.
        UserError: the source is gone or changed since it was planned.
    """
    stored = targets.read_unit(storage, identity, unit.hash, expect_sha256=object_sha256)
    if recipe.capture.generate is None:
        sequences, _ = corpus.read_unit_sequences(unit, recipe.corpus, tokenizer)
        found = compare_source(stored, sequences)
    else:
        prompts, _ = corpus.read_unit_prompts(unit, recipe.corpus, recipe.capture.generate, tokenizer)
        asked = [prompt for prompt in prompts for _ in range(recipe.capture.generate.samples)]
        found = compare_source(stored, asked, compare_completion)
    if found is not None:
        return found
    misaligned = ((i, check_alignment(identity, stored.sequence(i))) for i in range(len(stored)))
    found = next(((i, different) for i, different in misaligned if different is not None), None)
    return found or check_draws_fall(identity, stored)


def read_sequences(storage: Storage, identity: CaptureIdentity, unit: str, places: Places) -> list[StoredSequence]:
    """Some sequences of a unit, by their places in the stored order."""
    reader = targets.open_unit(storage, identity, unit)
    return [reader.sequences(i, i + 1)[0] for i in places]


def score_again(
    storage: Storage, identity: CaptureIdentity, scorer: Scorer, tolerance: Tolerance, unit: str, places: Places
) -> SequenceFigures:
    """Compare the rows of some sequences of a unit with the teacher's of now."""
    stored = read_sequences(storage, identity, unit, places)
    again = scorer([s.tokens for s in stored])
    assert again is not None, "an engine opened for its public path has it"
    return compare_again(identity, tolerance, places, stored, again)


def compare_again(
    identity: CaptureIdentity,
    tolerance: Tolerance,
    places: Places,
    stored: list[StoredSequence],
    scored: list[TargetRows | str],
) -> SequenceFigures:
    """Compare the rows of some sequences of a unit with the same scored again."""
    found = SequenceFigures()
    for i, sequence, again in zip(places, stored, scored, strict=True):
        if isinstance(again, str):
            refused = Difference(0, f"the teacher captured this sequence and cannot score it again: {again}")
            return SequenceFigures(found.rows, found.worst, found.worst_at, found.moved_mass, (i, refused))
        one = compare_rows(identity, sequence, targets.decode_rows(identity, sequence), again, tolerance)
        found = SequenceFigures(
            found.rows + one.rows,
            max(found.worst, one.worst),
            (i, one.worst_at) if one.worst > found.worst else found.worst_at,
            found.moved_mass + one.moved_mass,
            None if one.difference is None else (i, one.difference),
        )
        if found.difference is not None:
            break
    return found
