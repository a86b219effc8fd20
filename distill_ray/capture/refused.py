"""What of the corpus was refused: told, and held against `capture.max_refused` before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from distill_ray import corpus, targets
from distill_ray.config import Recipe
from distill_ray.errors import UserError
from distill_ray.schema import UNKNOWN_RECORD, DeadLetter, UnitSummary
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity
from distill_ray.units import Units

_DENSER = 4
_OPENED = 20
"""Units whose reasons are told where a capture stops early."""


def refusals(recipe: Recipe, summaries: pa.Table, letters: Sequence[DeadLetter]) -> corpus.Refusals:
    """Of all units of a run. Completions that `unfinished = "drop"` drops are no documents that were refused."""
    keys = summaries["doc_keys"].combine_chunks()
    taken = _documents(keys.flatten().to_numpy(), keys.value_lengths().to_numpy())
    counted = [letter.reason for letter in letters if not (_drops(recipe) and letter.record == UNKNOWN_RECORD)]
    return corpus.Refusals.of(taken, counted)


def require_few(recipe: Recipe, found: corpus.Refusals, where: str = "") -> None:
    """Raises UserError where more is refused than the recipe allows."""
    bound = recipe.capture.max_refused
    if found.beyond(bound, of_all=True):
        raise UserError(
            f"{found}{where}. capture.max_refused={bound:g} allows fewer, and nothing is trained; every captured unit "
            "is kept: mend the documents, or raise it"
        )


class Watch:
    """Says while a capture runs that its end is certain: even if all that is left were good, too much is refused.

    What is left is reckoned by its source bytes, with four times as many documents a byte as there were so far.

    Args:
        recipe: with the bound.
        storage: the recipe's root.
        identity: the capture.
        units: all of the run's.
    """

    def __init__(self, recipe: Recipe, storage: Storage, identity: CaptureIdentity, units: Units) -> None:
        self._recipe, self._storage, self._identity = recipe, storage, identity
        self._total = int(units.rows["bytes"].sum())
        self._taken, self._refused, self._bytes = 0, 0, 0
        self._units = list[str]()

    def add(self, summary: UnitSummary, size: int) -> None:
        """A unit of so many source bytes is captured.

        Raises:
            UserError: by now more than `capture.max_refused` of all documents.
        """
        self._taken += _documents(summary.doc_keys, np.array([len(summary.doc_keys)]))
        self._refused += summary.dead
        self._bytes += size
        if summary.dead:
            self._units.append(summary.unit)
        documents = self._taken + self._refused
        left = max(0.0, self._total / max(self._bytes, 1) - 1)
        expected = documents * (1 + _DENSER * left)
        if _drops(self._recipe) or self._refused <= self._recipe.capture.max_refused * expected:
            return
        letters = [
            letter.reason
            for unit in self._units[:_OPENED]
            for letter in targets.open_unit(self._storage, self._identity, unit).dead
        ]
        raise UserError(
            f"{self._refused:,} of the {documents:,} documents captured so far are refused, and that is more than "
            f"capture.max_refused={self._recipe.capture.max_refused:g} of all whatever is still to come; of "
            f"{len(self._units[:_OPENED])} unit(s) {corpus.Refusals.of(0, letters).why}. Every captured unit is kept: "
            "mend the documents, or raise it"
        )


def _documents(doc_keys: np.ndarray, lengths: np.ndarray) -> int:
    """Documents of units of so many sequences each; equal ones side by side in a unit count once."""
    first = np.ones(len(doc_keys), bool)
    first[1:] = doc_keys[1:] != doc_keys[:-1]
    begins = np.cumsum(lengths)
    first[begins[begins < len(doc_keys)]] = True
    return int(first.sum())


def _drops(recipe: Recipe) -> bool:
    return recipe.capture.generate is not None and recipe.capture.generate.unfinished == "drop"
