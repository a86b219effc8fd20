"""Target objects, each fetched whole once, verified, and kept in memory or on local disk within a bound."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from distill_ray import targets
from distill_ray.errors import IntegrityError
from distill_ray.ingest.plan import PlanUnit
from distill_ray.storage.base import Storage
from distill_ray.targets import CaptureIdentity, StoredSequence, UnitReader, unit_key

_COPIES = 2
"""A unit in memory takes its object's bytes and the columns parsed out of them."""


class OpenUnit(Protocol):
    """A verified unit, from which any sequence can be read."""

    def sequence(self, i: int) -> StoredSequence: ...


Fetch = Callable[[PlanUnit], OpenUnit]


class UnitCache:
    """The units used last; the least recently used goes first.

    Args:
        fetch: unit → its verified targets; called once for each unit that is not held.
        units: the units of the plan, whose sizes the bound counts.
        max_bytes: bound on the objects held; one unit is always kept, however large.
        max_units: bound on their number.
        say: called once, with a sentence, when a unit has to be fetched again.
    """

    def __init__(
        self,
        fetch: Fetch,
        units: Iterable[PlanUnit],
        max_bytes: int,
        max_units: int | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._fetch = fetch
        self._units = {u.hash: u for u in units}
        self._max_bytes, self._max_units = max_bytes, max_units or len(self._units)
        self._held: OrderedDict[str, OpenUnit] = OrderedDict()
        self._bytes = 0
        self._seen: set[str] = set()
        self._say = say
        self.fetched = 0
        """Fetches so far; more than the number of units means that the bound is too small for the shuffled order."""

    def get(self, unit: str) -> OpenUnit:
        """The unit's targets. Raises what `fetch` raises."""
        if unit in self._held:
            self._held.move_to_end(unit)
            return self._held[unit]
        size = self._units[unit].bytes
        while self._held and (self._bytes + size > self._max_bytes or len(self._held) >= self._max_units):
            out, _ = self._held.popitem(last=False)
            self._bytes -= self._units[out].bytes
        self._held[unit] = self._fetch(self._units[unit])
        self._bytes += size
        self.fetched += 1
        if unit in self._seen and self.fetched == len(self._seen) + 1:
            self._say(
                f"target objects are fetched repeatedly: this worker may hold {self._max_units} of {len(self._units)} "
                f"and {self._max_bytes / 2**30:.1f} of {sum(u.bytes for u in self._units.values()) / 2**30:.1f} GiB; "
                "give its node more local disk (TMPDIR) or a higher limit of open files"
            )
        self._seen.add(unit)
        return self._held[unit]


class DiskUnit:
    """A unit on local disk: a sequence costs one read of its row group, about 1 MiB, checked against its digest."""

    def __init__(self, reader: UnitReader) -> None:
        self._reader = reader

    def sequence(self, i: int) -> StoredSequence:
        """Raises IntegrityError when the bytes changed since they were fetched."""
        return self._reader.sequences(i, i + 1)[0]


def spool_unit(storage: Storage, identity: CaptureIdentity, unit: PlanUnit, folder: Path) -> DiskUnit:
    """Copy a unit's object to local disk and open it there.

    The copy has no name: it goes when the unit is dropped, or when the process dies, however it dies.

    Raises:
        NotFoundError: no such object.
        IntegrityError: not the object that the run's manifest recorded.
    """
    key = unit_key(identity, unit.hash)
    with tempfile.TemporaryDirectory(prefix="distill-ray-", dir=folder) as named:
        path = Path(named) / "unit"
        storage.download(key, path)
        file = path.open("rb", buffering=0)
    got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != unit.sha256:
        raise IntegrityError(
            f"{storage.uri}/{key}: SHA-256 {got}, but the run's manifest says {unit.sha256}: altered since it was "
            "captured; run `distill-ray capture` again"
        )
    size = file.seek(0, os.SEEK_END)

    def fetch(start: int, length: int) -> bytes:
        return os.pread(file.fileno(), length, start)

    return DiskUnit(UnitReader(size, fetch, identity.fingerprint, unit.hash, f"{storage.uri}/{key}"))


def open_cache(
    storage: Storage,
    identity: CaptureIdentity,
    units: tuple[PlanUnit, ...],
    *,
    memory_bytes: int = 2 * 2**30,
    disk_bytes: int | None = None,
    folder: Path | None = None,
    sharers: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> UnitCache:
    """A cache in memory where all units fit there, else on local disk.

    Batches draw from all units at random, so a bound below what they take together means fetching them repeatedly.

    Args:
        storage: where the target objects lie.
        identity: of the capture.
        units: of the plan.
        memory_bytes: most memory for whole units.
        disk_bytes: most local disk; None takes this process's part of half of what is free.
        folder: where on the local disk; None takes the system's folder for temporary files.
        sharers: processes of this node that each open such a cache.
        say: called once, with a sentence, when the bound makes units be fetched repeatedly.
    """
    if _COPIES * sum(u.bytes for u in units) <= memory_bytes:
        return UnitCache(lambda u: _read_whole(storage, identity, u), units, memory_bytes, say=say)
    place = folder or Path(tempfile.gettempdir())
    bound = shutil.disk_usage(place).free // 2 // sharers if disk_bytes is None else disk_bytes
    # Each unit on disk holds a file descriptor; half of them are left to everything else.
    descriptors = _allow_open_files() // 2
    return UnitCache(lambda u: spool_unit(storage, identity, u, place), units, bound, descriptors, say)


def _allow_open_files() -> int:
    """Raise this process's limit of open files (often 1,024) to the most it may have, and return that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return soft if soft != resource.RLIM_INFINITY else 2**20
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _read_whole(storage: Storage, identity: CaptureIdentity, unit: PlanUnit) -> OpenUnit:
    return targets.read_unit(storage, identity, unit.hash, expect_sha256=unit.sha256)
