"""The audit by what the capture's own teachers answered a second time: nothing is loaded, all is compared in here."""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np

from distill_ray import corpus, targets
from distill_ray.audit.sample import UnitSample, spread
from distill_ray.audit.tolerance import Tolerance
from distill_ray.audit.unit import Found, Places, SequenceFigures, check_unit, compare_again, read_sequences
from distill_ray.config import Recipe
from distill_ray.errors import IntegrityError, StoppedError
from distill_ray.schema import Unit
from distill_ray.storage import NotFoundError, Storage, stage_folder
from distill_ray.targets import ManifestUnit, RunManifest, Witness
from distill_ray.units import HASH, places_in


class WitnessAuditor:
    """Answers as a `RemoteAuditor` does, without a teacher.

    Args:
        recipe: of the run.
        storage: its root.
        manifest: its targets.
        tolerance: of the teacher's arithmetic.
        stop: ends the audit before the next unit or batch.
    """

    def __init__(
        self, recipe: Recipe, storage: Storage, manifest: RunManifest, tolerance: Tolerance, stop: threading.Event
    ) -> None:
        self._recipe, self._storage, self._manifest = recipe, storage, manifest
        self._identity, self._tolerance, self._stop = manifest.identity, tolerance, stop
        folder = stage_folder(recipe.teacher.model, weights=False)
        self._tokenizer = corpus.load_tokenizer(folder, recipe.teacher.trust_remote_code)
        self._witness = lru_cache(1)(self._read)
        self.notes: list[str] = []
        """What to say of the witnesses: how many there are, which could not be used."""

    def choose(self, seed: str) -> list[UnitSample]:
        """As many sequences as the recipe wants of those that have a witness, fewer where there are not so many.

        The newest witnesses come first: this week's units before those that an earlier week's audit could compare.
        """
        wanted, units = self._recipe.audit.sequences, self._manifest.units
        witnessed = np.array(targets.witnessed(self._storage, self._identity), HASH)
        at, there = places_in(units.hashes, witnessed)
        self.notes.append(f"chosen among {int(there.sum()):,} of {len(units):,} units, those with a second answer")
        found: list[tuple[ManifestUnit, list[int]]] = []
        for unit in (units[i] for i in at[there].tolist()):
            if len(found) == wanted:
                break
            if places := self._places(unit):
                found.append((unit, places))
        return spread(found, seed, wanted)

    def check(self, unit: Unit, object_sha256: str) -> Found | None:
        """`check_unit`."""
        self._go_on()
        return check_unit(self._storage, self._identity, self._recipe, self._tokenizer, unit, object_sha256)

    def score(self, unit: str, places: Places) -> SequenceFigures:
        """`compare_again` with the witnesses."""
        self._go_on()
        stored = read_sequences(self._storage, self._identity, unit, places)
        again = [self._witness(unit)[i].rows for i in places]
        return compare_again(self._identity, self._tolerance, places, stored, again)

    def _read(self, unit: str) -> dict[int, Witness]:
        return targets.read_witness(self._storage, self._identity, unit)

    def _places(self, unit: ManifestUnit) -> list[int]:
        """Of the sequences that the witness can speak of."""
        self._go_on()
        try:
            witness = self._witness(unit.unit)
        except (IntegrityError, NotFoundError) as error:
            self.notes.append(f"not used: {error}")
            return []
        places = tuple(i for i in sorted(witness) if i < len(unit.lengths))
        if self._identity.generate is None:
            return list(places)
        # Two captures may have written other completions, of which one object stayed.
        stored = read_sequences(self._storage, self._identity, unit.unit, places)
        return [i for i, s in zip(places, stored, strict=True) if np.array_equal(s.tokens, witness[i].tokens)]

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise StoppedError("the audit was stopped; the same command begins it anew, all targets are kept")
