"""What the runs under a root refer to, by their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distill_ray import targets
from distill_ray.errors import IntegrityError
from distill_ray.lease import LeaseRecord, is_live, read_record
from distill_ray.registry import read_latest
from distill_ray.storage import Storage
from distill_ray.units import HASH


@dataclass(frozen=True)
class Run:
    """One run's record as it was read."""

    prefix: str
    """`runs/<name>/<version>`."""
    record: LeaseRecord

    @property
    def live(self) -> bool:
        """Whether somebody works on it."""
        return is_live(self.record)

    @property
    def capture(self) -> str | None:
        """Fingerprint of the capture that it uses or is about to; None where the record does not say."""
        published = self.record.published
        named = published.get("targets", {}).get("fingerprint")
        return named or published.get("identity", {}).get("of", {}).get("capture_fingerprint")


def read_runs(storage: Storage) -> list[Run]:
    """Every run with a record. Raises IntegrityError where one is damaged: what it refers to is not known then."""
    keys = [info.key for info in storage.list("runs/")]
    prefixes = [key.removesuffix("/lease.json") for key in keys if key.count("/") == 3 and key.endswith("/lease.json")]
    found = ((prefix, read_record(storage, prefix)) for prefix in sorted(prefixes))
    return [Run(prefix, record) for prefix, record in found if record is not None]


class References:
    """What must stay.

    Args:
        storage: the root.
        runs: as `read_runs` gives them.
    """

    def __init__(self, storage: Storage, runs: list[Run]) -> None:
        self._storage, self.runs = storage, runs
        self.notes: list[str] = []
        """What stays because it cannot be told whether somebody refers to it."""
        self._live = tuple(f"{run.prefix}/" for run in runs if run.live)
        self._live += tuple(f"models/{run.prefix.removeprefix('runs/')}/" for run in runs if run.live)
        self.folders = {folder for run in runs for folder in _folders(run.record.published)}
        self.records = {run.prefix for run in runs}
        for name in sorted({run.prefix.split("/")[1] for run in runs} | self._models()):
            self._add_latest(name)

    def refreshed(self) -> References:
        """What must stay now; this very object where no driver began, ended or published targets since."""
        runs = read_runs(self._storage)
        return self if list(map(_state, runs)) == list(map(_state, self.runs)) else References(self._storage, runs)

    def _models(self) -> set[str]:
        return {info.key.split("/")[1] for info in self._storage.list("models/")}

    def _add_latest(self, name: str) -> None:
        try:
            latest = read_latest(self._storage, name)
        except IntegrityError as error:
            self.notes.append(f"models/{name} stays: {error}")
            self._live += (f"models/{name}/",)
            return
        if latest is not None:
            self.folders |= set(_folders({"latest": latest.entry}))

    def is_held(self, key: str) -> bool:
        """Whether the key belongs to a run that somebody works on."""
        return key.startswith(self._live)

    @cached_property
    def whole_captures(self) -> set[str]:
        """Captures of which everything stays: a live driver counts on what it found there."""
        return {run.capture for run in self.runs if run.live and run.capture is not None} | set(self._units[1])

    @property
    def all_captures(self) -> bool:
        """Whether a driver is at work that has not said yet which capture it uses."""
        return any(run.live and run.capture is None for run in self.runs)

    def units(self, capture: str) -> np.ndarray:
        """[n] ascending hashes of the units of a capture that some run's manifest names."""
        return self._units[0].get(capture, np.array([], HASH))

    @cached_property
    def _units(self) -> tuple[dict[str, np.ndarray], list[str]]:
        found: dict[str, np.ndarray] = {}
        unknown = []
        for run in self.runs:
            entry = run.record.published.get("targets")
            if entry is None:
                continue
            try:
                hashes = targets.read_run_manifest(self._storage, entry).units.hashes
            except IntegrityError as error:
                self.notes.append(f"targets/{entry['fingerprint']} stays whole: {error}")
                unknown.append(entry["fingerprint"])
                continue
            capture = entry["fingerprint"]
            found[capture] = np.union1d(found[capture], hashes) if capture in found else hashes
        return found, unknown


def _state(run: Run) -> tuple[str, int, bool, dict[str, Any]]:
    return run.prefix, run.record.epoch, run.live, run.record.published


def _folders(value: Any) -> Iterator[str]:
    """Folders of all manifests that the entries of a record name."""
    if not isinstance(value, Mapping):
        return
    key = value.get("key")
    if isinstance(key, str) and key.endswith("/manifest.json"):
        yield key.removesuffix("/manifest.json")
    for item in value.values():
        yield from _folders(item)
